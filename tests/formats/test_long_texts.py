"""Long texts are encoded as short ones are, without holding Python's lock."""

import pytest

from llama_jax.demo.make_tokenizer import FOLDER
from llama_jax.formats.long_texts import LONG_CHARACTERS, encode_text, text_ids
from llama_jax.formats.tokenizer import Tokenizer, load_tokenizer
from tests.formats import text_fixtures as tiny

TEXT = "Ein Lama läuft über\n\n  den 12345. Berg <|eot_id|> \U0001f999 nach x" * 500


@pytest.fixture(scope="module", params=["bytes", "llama3"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "bytes":
        return load_tokenizer(FOLDER)
    return load_tokenizer(tiny.llama3_folder(tmp_path_factory.mktemp("llama3")))


def test_long_texts_have_the_same_ids_and_offsets(tokenizer: Tokenizer) -> None:
    assert len(TEXT) > LONG_CHARACTERS
    reference = tokenizer.backend.encode(TEXT, add_special_tokens=False)
    assert text_ids(tokenizer.backend, TEXT) == reference.ids
    encoding = encode_text(tokenizer.backend, TEXT)
    assert (encoding.ids, encoding.offsets) == (reference.ids, reference.offsets)


class Backend:
    """Calls as the library has them."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> object:
        def call(text: object, **options: object) -> object:
            self.called.append(name)
            return [Encoding()] if isinstance(text, list) else Encoding()

        return call


class Encoding:
    ids = (1, 2)


@pytest.mark.parametrize("characters", [LONG_CHARACTERS - 1, LONG_CHARACTERS])
def test_only_long_texts_go_as_a_batch_which_frees_the_lock(characters: int) -> None:
    backend = Backend()
    assert text_ids(backend, "x" * characters) == [1, 2]  # type: ignore[arg-type]
    encode_text(backend, "x" * characters)  # type: ignore[arg-type]
    is_long = characters == LONG_CHARACTERS
    assert backend.called == (["encode_batch_fast", "encode_batch"] if is_long else ["encode"] * 2)
