"""The words around a dialog: templates by name, the checkpoint's own, or one in a file.

    alpaca       Stanford's two prompts (tatsu-lab/stanford_alpaca, train.py); a later turn begins "\n\n### Instruction:"
    cla1         Chinese-LLaMA-Alpaca's: one prompt, a space at its end, prompt and answer tokenised separately
    cla2         its second version: llama2-chat with its own system message, separately
    llama2-chat  [INST] <<SYS>> ... [/INST], BOS and EOS around each turn (meta-llama/llama, generation.py)
    llama3       <|start_header_id|>user<|end_header_id|> ... <|eot_id|> (llama-models, llama3/chat_format.py)
    chatml       <|im_start|>user ... <|im_end|>, with SmolLM2's system message where the dialog has none
    vicuna       USER: ... ASSISTANT: ...</s> (FastChat, conversation.py, vicuna_v1.1)
    minichat     [|User|] ...</s>[|Assistant|] ...</s>, each part tokenised by itself (MiniMA)
    zephyr       <|user|> ...</s>
    accessory    ### Human: ... ### Assistant: ... ### (LLaMA2-Accessory, conv_v1_2), and EOS
    none         prompt and answer as they are

    checkpoint   the chat_template beside the tokenizer, see chat_template.py; a path to a .jinja works too

BOS stands in front where the tokenizer's family uses it (`Tokenizer.add_bos`), EOS after each answer where the template
names no token of its own. Every template gives pieces (dialog.py), so a special token is an id and never found in text.
Test: pytest tests/unit/test_templates.py
"""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import unknown_name
from ..tokenizer import Tokenizer
from . import dialog
from .chat_template import ChatTemplate, beside
from .dialog import Encoder, Message, Piece, Template, encode_prompt

BELOW = "Below is an instruction that describes a task"
WITH_INPUT = (
    f"{BELOW}, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    f"{BELOW}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
CLA2 = "You are a helpful assistant. 你是一个乐于助人的助手。"
SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ACCESSORY = VICUNA.replace("user", "human")
MINICHAT = (
    "‘MiniChat’是一个由‘Beccurio’开发的AI语言模型。下面是人类和MiniChat之间的一段对话。MiniChat的回复应当尽可能详细，"
    "并且以Markdown的形式输出。MiniChat应当拒绝参与违背伦理的讨论。"
)
DEFAULTS = {"alpaca": "alpaca", "prompt": "none", "text": "none"}  # of record formats; dialogs: the checkpoint's own


class Named:
    """A template of this file. The methods give the pieces of a dialog whose order is already checked."""

    def __init__(self, name: str, tokenizer: Tokenizer, specials: Sequence[str] = ()):
        self.name, self.tokenizer = name, tokenizer
        self.build, self.tokenize, self.alternates, self.roles = NAMED[name]
        self.specials = {token: self.special(token) for token in specials}
        for token in {"llama3": ("<|start_header_id|>", "<|eot_id|>"), "chatml": ("<|im_start|>",)}.get(name, ()):
            self.special(token)  # says so at once where there is none

    def pieces(self, messages: Sequence[Message], learnt: Collection[int] = (), prompt: bool = False) -> list[Piece]:
        """ValueError where the template has no place for a message."""
        self.check(messages)
        pieces: list[Piece] = []
        for piece in self.build(self, messages, prompt):
            after_bos = self.tokenizer.add_bos and pieces and pieces[-1].content == self.tokenizer.bos_id
            pieces.append(piece._replace(cut=True) if after_bos else piece)
        return pieces

    def check(self, messages: Sequence[Message]) -> None:
        begins = bool(messages) and messages[0].role == "system"
        for i, message in enumerate(messages):
            place = f"message {i + 1} ({message.role})"
            if message.role not in self.roles:
                raise ValueError(f"{place}: --template {self.name} has no place for it: choose another template")
            if message.role == "system" and i and self.name not in ("chatml", "llama3", "zephyr"):
                raise ValueError(f"{place}: --template {self.name} takes a system message at the beginning only")
            expected = "user" if (i - begins) % 2 == 0 else "assistant"
            if self.alternates and not (begins and i == 0) and message.role != expected:
                raise ValueError(
                    f"{place}: --template {self.name} needs user and assistant in turns, the user first: repair the "
                    "dialog, or choose another template"
                )

    # --- what the builders share

    def special(self, name: str) -> int:
        if name not in self.tokenizer.special_tokens:
            raise ValueError(
                f"{self.tokenizer.path} has no special token {name}: choose another --template, or add it with "
                "tools/merge_tokenizer.py --special_tokens and tools/expand_vocab.py"
            )
        return self.tokenizer.special_tokens[name]

    def bos(self) -> Iterator[Piece]:
        if self.tokenizer.add_bos:
            yield Piece(self.tokenizer.encode("", bos=True)[0])

    def eos(self, message: int | None = None) -> Piece:
        return Piece(self.tokenizer.encode("", eos=True)[0], message, end=True)

    def markup(self, text: str) -> Iterator[Piece]:
        """Words of the template's own, special tokens in them read."""
        names = sorted(self.tokenizer.special_tokens, key=len, reverse=True)
        for part in re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]:
            if part:
                yield Piece(self.tokenizer.special_tokens.get(part, part))

    # --- the templates

    def alpaca(self, messages: Sequence[Message], prompt: bool, end: str = "", merged: bool = False) -> Iterator[Piece]:
        yield from self.bos()
        system = None
        for i, m in enumerate(messages):
            if m.role == "system":
                system = m.text
            elif m.role == "assistant":
                yield from (Piece(m.text, i), self.eos(i))
            else:
                first = i == 0 or messages[i - 1].role == "system"
                inner = m.input and not merged
                head, tail = (WITH_INPUT if inner else WITHOUT_INPUT).split("{instruction}")
                head = head if first and system is None else f"{system if first else ''}\n\n### Instruction:\n"
                tail, *rest = tail.split("{input}")
                yield Piece(head)
                yield from (Piece(m.words if merged else m.text, i), Piece(tail))
                if inner:
                    yield from (Piece(m.input, i), Piece(rest[0]))
                yield Piece(end)

    def cla1(self, messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
        return self.alpaca(messages, prompt, end=" ", merged=True)

    def llama2_chat(
        self, messages: Sequence[Message], prompt: bool, around: str = " ", system: str | None = None
    ) -> Iterator[Piece]:
        for i, m in enumerate(messages):
            if m.role == "system":
                system = m.text
            elif m.role == "assistant":
                yield from (Piece(f"{around}{m.text.strip() if around else m.text}{around}", i), self.eos(i))
            else:
                block = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system is not None else ""
                words, system = (block + m.words).strip(), None
                block = block if words.startswith(block) else ""
                yield from self.bos()
                yield from (Piece("[INST] " + block), Piece(words[len(block) :], i), Piece(" [/INST]"))

    def cla2(self, messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
        return self.llama2_chat(messages, prompt, around="", system=CLA2)

    def llama3(self, messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
        start, stop, end = map(self.special, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))

        def header(role: str) -> list[Piece]:
            return [Piece(start), Piece("ipython" if role == "tool" else role), Piece(stop), Piece("\n\n")]

        yield from self.bos()
        for i, m in enumerate(messages):
            yield from (*header(m.role), Piece(m.words.strip(), i), Piece(end, i, end=True))
        yield from header("assistant") if prompt else ()

    def chatml(self, messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
        start, end = self.special("<|im_start|>"), self.special("<|im_end|>")
        yield from self.bos() if self.tokenizer.bos_id != start else ()
        if not messages or messages[0].role != "system":
            yield from (Piece(start), Piece(f"system\n{SMOLLM2}"), Piece(end), Piece("\n"))
        for i, m in enumerate(messages):
            yield from (Piece(start), Piece(f"{m.role}\n"), Piece(m.words, i), Piece(end, i, end=True), Piece("\n"))
        yield from (Piece(start), Piece("assistant\n")) if prompt else ()

    def vicuna(self, messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
        yield from self.bos()
        given = messages and messages[0].role == "system"
        yield Piece((messages[0].text if given else VICUNA) + " ")
        for i, m in enumerate(messages):
            if m.role == "user":
                yield from (Piece("USER: "), Piece(m.words, i), Piece(" "))
            elif m.role == "assistant":
                yield from (Piece("ASSISTANT:"), Piece(f" {m.text}", i), self.eos(i))
        yield from [Piece("ASSISTANT:")] if prompt else ()

    def minichat(self, messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
        given = messages and messages[0].role == "system"
        yield from (Piece(messages[0].text if given else MINICHAT, cut=True), self.eos())
        for i, m in enumerate(messages):
            if m.role != "system":
                name = "[|User|]" if m.role == "user" else "[|Assistant|]"
                yield from (Piece(name, cut=True), Piece(m.words, i, cut=True), self.eos(i))
        yield from [Piece("[|Assistant|]", cut=True)] if prompt else ()

    def zephyr(self, messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
        yield from self.bos()
        for i, m in enumerate(messages):
            yield from (*self.markup(f"<|{m.role}|>\n"), Piece(m.words, i), self.eos(i), Piece("\n"))
        yield from self.markup("<|assistant|>\n") if prompt else ()

    def accessory(self, messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
        yield from self.bos()
        given = messages and messages[0].role == "system"
        yield Piece((messages[0].text if given else ACCESSORY) + "\n\n###")
        for i, m in enumerate(messages):
            if m.role == "user":
                yield from (Piece(" Human: "), Piece(m.words, i), Piece("\n###", i, end=True))
            elif m.role == "assistant":
                yield from (Piece(" Assistant:"), Piece(f" {m.text}", i), Piece("\n###", i, end=True))
        yield Piece(" Assistant:") if prompt else self.eos(len(messages) - 1)

    def none(self, messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
        yield from self.bos()
        names = "|".join(map(re.escape, sorted(self.specials, key=len, reverse=True)))
        for i, m in enumerate(messages):
            parts = re.split(f"({names})", m.text) if m.role == "text" and names else [m.words]
            yield from (Piece(self.specials.get(part, part), i) for part in parts if part)
            if m.role in dialog.ANSWERS:
                yield self.eos(i)


TWO, THREE = ("user", "assistant"), ("system", "user", "assistant")
NAMED: dict[str, tuple[Any, str, bool, tuple[str, ...]]] = {  # builder, --tokenize, strictly in turns, roles
    "alpaca": (Named.alpaca, "joint", True, THREE),
    "cla1": (Named.cla1, "separate", True, THREE),
    "cla2": (Named.cla2, "separate", True, THREE),
    "llama2-chat": (Named.llama2_chat, "joint", True, THREE),
    "llama3": (Named.llama3, "joint", False, (*THREE, "tool")),
    "chatml": (Named.chatml, "joint", False, (*THREE, "tool")),
    "vicuna": (Named.vicuna, "joint", False, THREE),
    "minichat": (Named.minichat, "separate", False, THREE),
    "zephyr": (Named.zephyr, "joint", False, THREE),
    "accessory": (Named.accessory, "joint", False, THREE),
    "none": (Named.none, "joint", False, (*THREE, "text")),
}


def open_template(
    name: str | None, tokenizer: Tokenizer, kind: str = "messages", specials: Sequence[str] = (), date: str = ""
) -> Template:
    """A template by name, `checkpoint`, or a path; None: what records of the format `kind` have where nobody chooses.

    specials: the special tokens that a whole text has in it. ValueError says which names there are."""
    name = name or DEFAULTS.get(kind)
    if kind == "text" and name != "none":
        raise ValueError(f"--template {name}: a whole text has nothing put around it: leave the template out")
    if name in NAMED:
        return Named(name, tokenizer, specials)
    if name in (None, "checkpoint"):
        source = beside(tokenizer.path)
        if source is None:
            raise ValueError(
                f"{tokenizer.path} has no chat template beside it: choose one with --template ({', '.join(NAMED)})"
            )
        return ChatTemplate(source, tokenizer, "checkpoint", date)
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(unknown_name("--template", name, (*NAMED, "checkpoint", "a file")))
    return ChatTemplate(beside(path) or "", tokenizer, name, date)


def question_ids(tokenizer: Tokenizer, text: str, template: Template | str | None = None, date: str = "") -> list[int]:
    """What an answer to one question is generated from: the question in a template, Alpaca's where none is named."""
    named = template is None or isinstance(template, str)
    worded = open_template(template, tokenizer, "alpaca", date=date) if named else template
    return encode_prompt([Message("user", text)], worded, Encoder(tokenizer))
