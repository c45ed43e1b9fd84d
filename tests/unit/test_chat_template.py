"""A checkpoint's Jinja template: transformers' text, bounds that hold or a refusal, and nothing that a hostile one can do."""

import json
import time
from datetime import datetime
from pathlib import Path

import pytest

from accessory.data.chat_template import ChatTemplate, beside
from accessory.data.dialog import Dialog, Encoder, Message, Rules, encode_dialog
from accessory.data.templates import open_template
from accessory.tokenizer import Tokenizer
from tests.helpers import tiny_tokenizer

CHAT = [Message("system", " Be <brief> & 'nice'. "), Message("user", "Hi 🙂\n"), Message("assistant", " Hello!  ")]
CHAT += [Message("user", "And?"), Message("assistant", "Bye")]
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
DIALECT = {
    "blocks": "{%- for m in messages %}\n    {%- if m.role == 'user' %}\nQ: {{ m.content | trim }}\n    {%- else %}\nA: "
    "{{- m['content'] | upper }}\n    {%- endif %}\n{%- endfor %}\n",
    "json": "{{ messages | tojson(indent=2) }}{{ messages[0] | tojson }}{{ {'é': '<&>'} | tojson }}",
    "namespace": "{% set ns = namespace(n=0, text='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.text = ns.text ~ "
    "ns.n ~ m.role %}{% if ns.n == 3 %}{% break %}{% endif %}{% endfor %}{{ ns.text }}{{ ns.n * 3 }}{{ '-' * 5 }}",
    "macro": "{% macro f(m, n=1) %}[{{ m.content | replace('i', 'II') }}{{ caller() if caller }}]{% endmacro %}"
    "{% for m in messages if m.role != 'system' %}{{ f(m) }}{% endfor %}",
    "tests": "{{ tools is none }} {{ documents is defined }} {{ nothing is defined }} {{ messages | length }} {{ messages[::-1][0].content }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}{{ range(3) | list }}",
    "methods": "{% for m in messages %}{{ m.content.strip().split(' ')[-1] }}{{ m.content.startswith('Hi') }}{{ loop.index0 }}"
    "{{ loop.last }}{{ m.get('x', 'none') }}{% endfor %}{{ '%s=%d' % ('a', 3) }}{{ '{}+{:>4}'.format(1, 2) }}",
    "tokens": "{{ bos_token }}{{ eos_token }}{{ 1 + 2 ** 3 }}{{ dict(a=1).items() | list }}",
    "now": "{{ strftime_now('%d %b %Y') }}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.model").write_bytes(tiny_tokenizer())
    return Tokenizer.open(directory).with_special_tokens(["<|im_start|>", "<|im_end|>"])


def encode(source: str, tokenizer: Tokenizer, messages: list[Message], train_on: str = "all"):
    template = ChatTemplate(source, tokenizer, "mine")
    return encode_dialog(
        Dialog("d:1", "messages", tuple(messages)), template, Encoder(tokenizer), Rules(train_on, max_seq_len=9999)
    )


@pytest.mark.parametrize("name", DIALECT)
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_transformers(tokenizer: Tokenizer, name: str, prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = DIALECT[name] + PROMPT
    chat = [{"role": m.role, "content": m.text} for m in CHAT]
    (expected,), _ = render_jinja_template(
        [chat], chat_template=source, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
    )
    today = datetime.now().strftime("%Y-%m-%d")
    assert ChatTemplate(source, tokenizer, "mine", today).render(CHAT, prompt) == expected


def test_the_date_stands_still(tokenizer: Tokenizer) -> None:
    assert ChatTemplate(DIALECT["now"], tokenizer, "x").render(CHAT) == "26 Jul 2024"
    assert ChatTemplate(DIALECT["now"], tokenizer, "x", "2025-01-02").render(CHAT) == "02 Jan 2025"
    with pytest.raises(ValueError, match="--template_date 1.2.2025: write it as"):
        ChatTemplate(DIALECT["now"], tokenizer, "x", "1.2.2025")


def test_where_it_is_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config, file, model = (tmp_path / n for n in ("tokenizer_config.json", "chat_template.jinja", "tokenizer.model"))
    assert beside(model) is None
    config.write_text(json.dumps({"chat_template": "one"}))
    assert beside(model) == beside(config) == "one"
    config.write_text(
        json.dumps({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]})
    )
    assert beside(model) == "d"
    file.write_text("file")
    assert beside(model) == beside(file) == "file"
    file.unlink()
    for bad in ("[]", "{", '{"chat_template": 3}', '{"chat_template": [3]}', "\udcff"):
        config.write_text(bad, errors="surrogateescape")
        with pytest.raises(ValueError, match="tokenizer_config.json"):
            beside(model)


# --- bounds -----------------------------------------------------------------------------------------------------------


def learnt_text(tokenizer: Tokenizer, found) -> str:
    return tokenizer.decode_with_specials([i for i, yes in zip(found.ids, found.learnt) if yes], "plain")


def test_answers_end_with_their_token_not_with_the_line(tokenizer: Tokenizer) -> None:
    found = encode(CHATML + PROMPT, tokenizer, CHAT)
    end = tokenizer.special_tokens["<|im_end|>"]
    ends = [k for k, (i, yes) in enumerate(zip(found.ids, found.learnt)) if yes and not (found.learnt + [False])[k + 1]]
    assert [found.ids[k] for k in ends] == [end, end]
    assert learnt_text(tokenizer, found).replace(" ", "") == "Hello!<|im_end|>Bye<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name(tokenizer: Tokenizer) -> None:
    """As those do that take the thinking out of all answers but the last."""
    source = "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last or m.role == 'user' else m.content[:2] }}<|im_end|>{% endfor %}"
    with pytest.raises(
        ValueError, match="^d:1: --template mine writes the first 3 messages in another way .*--train_on last"
    ):
        encode(source, tokenizer, CHAT)
    assert encode(source, tokenizer, CHAT[:3]).learnt.count(True) > 1  # one answer: nothing to rewrite
    last = encode(source.replace("{{ m.role }}: ", ""), tokenizer, CHAT, "last")
    assert learnt_text(tokenizer, last).replace(" ", "") == "Bye<|im_end|>"


def test_generation_blocks_must_be_the_answers(tokenizer: Tokenizer) -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(ValueError, match="mine has 5 {% generation %} blocks for 2 answers"):
        encode(source, tokenizer, CHAT)


def test_only_answers_can_be_flagged(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"message 1 \(user\) is to be learnt"):
        encode(CHATML, tokenizer, [Message("user", "a", True), Message("assistant", "b")], "flagged")


def test_private_characters_in_a_dialog_stay(tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, range(0x100000, 0x100010))) + "<|im_end|>"
    found = encode(CHATML + PROMPT, tokenizer, [Message("user", text), Message("assistant", text)])
    assert (
        learnt_text(tokenizer, found).strip() == text + "<|im_end|>"
        and found.ids.count(tokenizer.special_tokens["<|im_end|>"]) == 2
    )
    every = "".join(map(chr, range(0x100000, 0x100040)))
    with pytest.raises(ValueError, match=r"U\+100000"):
        encode(CHATML, tokenizer, [Message("user", every), Message("assistant", "b")])


# --- hostile ----------------------------------------------------------------------------------------------------------

HOSTILE = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.os }}",
    "attr": "{{ messages | attr('__class__') }}",
    "mutate": "{% set _ = messages.append(1) %}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "format": "{{ '{0.__class__}'.format(messages) }}",
    "format_map": "{{ '{a}'.format_map(messages[0]) }}",
    "namespace": "{% set ns = namespace(__class__=3) %}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "self": "{{ self.__init__.__globals__ }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "quiet_loops": "{% for i in range(900) %}{% for j in 'x' * 900 %}{% for k in 'x' * 900 %}{% endfor %}{% endfor %}{% endfor %}",
    "times": "{{ 'a' * 10**10 }}",
    "list_times": "{{ [1] * 10**10 }}",
    "doubling": "{% set ns = namespace(t='aaaaaaaa') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "plus": "{% set ns = namespace(t='aaaaaaaa') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "kept": "{% set ns = namespace(t=[]) %}{% for i in range(9999) %}{% set ns.t = ns.t + [i ~ 'a' * 8000000] %}{% endfor %}",
    "lists": "{% set ns = namespace(t=[]) %}{% for i in range(9999) %}{% set ns.t = ns.t + [('a' * 8000000) | list] %}{% endfor %}",
    "replace": "{{ ('a' * 90000) | replace('a', 'b' * 90000) }}",
    "replace_method": "{{ ('a' * 90000).replace('a', 'b' * 90000) }}",
    "join": "{{ ('a' * 90000).join('b' * 90000) }}",
    "join_filter": "{{ ('a' * 90000) | join('b' * 90000) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent_star": "{{ '%*d' % (10**10, 1) }}",
    "format_width": "{{ '{:10000000000}'.format(1) }}",
    "indent": "{{ messages | tojson(indent=10**10) }}",
    "date": "{{ strftime_now('%9999999999Y') }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": "{% set ns = namespace(n=99) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(80) }}",
    "output": "{% for i in range(9999) %}" + "x" * 9000 + "{% endfor %}",
    "block": "{% set t %}{% for i in range(9999) %}{{ 'x' * 9000 }}{% endfor %}{% endset %}",
    "random": "{{ messages | random }}",
    "raises": "{{ raise_exception('no system role, please') }}",
    "undefined": "{{ nothing.at.all }}",
    "zero": "{{ 1 // 0 }}",
    "type": "{{ messages + 1 }}",
    "syntax": "{% for %}",
    "unclosed": "{{ messages",
    "deep": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "deep_list": "{{ " + "[" * 900 + "]" * 900 + " }}",
    "unknown": "{{ messages | shell }}",
    "empty": "  ",
    "huge": "x" * 300_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_broken_template_is_one_line(tokenizer: Tokenizer, name: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ValueError, match="--template mine") as error:
        encode(HOSTILE[name], tokenizer, CHAT)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert time.monotonic() - begun < 10


def test_the_clock_ends_what_the_counts_do_not(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accessory.data.limited.SECONDS", 0.0)
    with pytest.raises(ValueError, match="far too long"):
        encode(CHATML, tokenizer, CHAT)


def test_a_saved_tokenizer_keeps_its_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.model").write_bytes(tiny_tokenizer())
    (tmp_path / "a" / "chat_template.jinja").write_text(CHATML)
    Tokenizer.open(tmp_path / "a").save(tmp_path / "b")
    saved = Tokenizer.open(tmp_path / "b")
    assert isinstance(open_template(None, saved), ChatTemplate) and open_template("checkpoint", saved).source == CHATML
