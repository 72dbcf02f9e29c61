"""The sections of a run config, one file for each key of the YAML file: fields, their descriptions
and bounds, and what within a section does not fit together. What does not fit between sections is
refused by `train/config_checks.py` and `train/methods.py`. The sections `compute` and `lora` are
the library's own.
"""
