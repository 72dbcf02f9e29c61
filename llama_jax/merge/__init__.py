"""Models into one: `model.py` writes it, tensor by tensor, or `adapter.py` one adapter of several.

The arithmetic and the recipe are in `weights/merge.py` and `weights/merge_recipe.py`.
"""
