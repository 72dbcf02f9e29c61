"""Tiny tokenizers and chat templates for the text tests: built here, nothing downloaded."""

import base64
import io
import json
import random
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from llama_jax.formats.byte_level import LLAMA3_SPLIT, byte_alphabet
from llama_jax.formats.tiktoken_model import llama3_control_tokens

_WORDS = (
    "hello world tree leaf ask the a of and wait it's (a , b) . ? ! Hello World 안녕 세계 👍 été "
    '==== ---- 12 345 x=1; def return system user assistant obey <s> </s> <X> "quoted" \\n'
)
WORDS = _WORDS.split(" ")

TEXTS = [
    "", " ", "  ", "\n", "hello world", " hello", "  hello  world  ", "Hello, World!",
    "안녕 세계 👍",
    "wait ! it 's (a , b) .", " ?", "a\nb\n\nc\t d", "12 345 6789", "naïve café été", "====------",
    "def f(x):\n    return x + 1\n", "\u00a0nbsp\u200bzero", "▁▁x ▁y",
    "mixed 한글 and العربية and 日本語",
    "👍👍🏽", "trailing ", "\r\nline", "<0x41>", "a" * 40, "aaa bbb ====== = ==", "�",
]  # fmt: skip

CONTROL_TEXTS = ["</s>Tree", "<s>ask", "<s>", "a<s> b</s>", "<s><s>x", " <s>x", "x </s> y"]

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA2_TEMPLATE = """\
{% if messages[0]['role'] == 'system' %}
{% set rest = messages[1:] %}
{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
{% else %}
{% set rest = messages %}{% set system = '' %}
{% endif %}
{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant') }}
{% endif %}
{% if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' -}}
{% elif message['role'] == 'assistant' %}
{{- ' ' + message['content'].strip() + ' ' + eos_token -}}
{% endif %}
{% endfor %}"""  # noqa: E501

LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- if tools is not none %}{{- "Tools: " + (tools | tojson(indent=4)) + "\\n" }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == 'ipython' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""  # noqa: E501

MISTRAL_TEMPLATE = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- set ns = namespace(count=0) %}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- set ns.count = ns.count + 1 %}
        {%- if loop.first and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant, not " ~ message["role"]) }}
    {%- endif %}
{%- endfor %}
"""


def corpus(lines: int = 300) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=10)) for _ in range(lines)]


def byte_level(control: list[str], *, vocab_size: int = 420) -> tokenizers.Tokenizer:
    """A byte-level BPE cut like Llama 3, trained on the corpus, with control tokens on top."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in control])
    return tokenizer


def llama3_folder(folder: Path, template: str | None = LLAMA3_TEMPLATE, **config: object) -> Path:
    """A folder like Llama 3's: BOS by post-processor, end token unlike the turn terminator."""
    control = llama3_control_tokens(16)
    tokenizer = byte_level(control)
    bos = control[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos} $B",
                special_tokens=[(bos, tokenizer.token_to_id(bos))],
            ),
        ]
    )
    return write_folder(
        folder,
        tokenizer,
        {"bos_token": bos, "eos_token": control[1], "chat_template": template, **config},
    )


def chatml_folder(folder: Path, template: str = SMOLLM2_TEMPLATE, **config: object) -> Path:
    """A folder like SmolLM2's: no BOS added, turns end with the end token."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    values = {"bos_token": control[1], "eos_token": control[2], "chat_template": template}
    return write_folder(folder, byte_level(control), {**values, **config})


def write_folder(folder: Path, tokenizer: tokenizers.Tokenizer, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def train_sentencepiece(folder: Path, **options: object) -> sentencepiece.SentencePieceProcessor:
    """Trains folder/tokenizer.model with Llama 2's options and returns the reference."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.9995,
        "split_digits": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, **{**settings, **options}
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_tiktoken(folder: Path) -> dict[bytes, int]:
    """A hand-made tiktoken file: the 256 bytes, then joins in the order of their rank."""
    folder.mkdir(parents=True, exist_ok=True)
    joins = [
        "he",
        "ll",
        "hell",
        "hello",
        " w",
        "or",
        " wor",
        "ld",
        " world",
        "==",
        "====",
        "안",
        "12",
    ]
    tokens = [bytes([byte]) for byte in range(256)] + [join.encode() for join in joins]
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    return {token: rank for rank, token in enumerate(tokens)}


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Words, runs, spaces and single signs in random order."""
    rng = random.Random(seed)
    signs = [
        " ",
        "  ",
        "\n",
        "=",
        "==",
        "-",
        "a",
        "aa",
        "ab",
        "é",
        "한",
        "👍",
        "\u0301",
        "1",
        "x",
        "▁",
    ]
    return ["".join(rng.choices(WORDS + signs * 2, k=rng.randint(1, 14))) for _ in range(count)]


def byte_character(byte: int) -> str:
    """How byte-level BPE spells one byte."""
    return next(text for text, value in byte_alphabet().items() if value == byte)
