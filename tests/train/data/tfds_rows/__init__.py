"""A TFDS builder of chat rows; TFDS wants it in a package folder."""

from collections.abc import Iterator

import tensorflow_datasets as tfds


class TfdsRows(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"messages": tfds.features.Sequence(message), "note": tfds.features.Text()}
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(3), "test": self._generate_examples(1)}

    def _generate_examples(self, count: int) -> Iterator:
        for number in range(count):
            messages = [
                {"role": "user", "content": f"frage {number} ü"},
                {"role": "assistant", "content": f"antwort {number}"},
            ]
            yield number, {"messages": messages, "note": "not a row's field"}
