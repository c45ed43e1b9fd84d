"""A record of any known format -> a Dialog. Which format it is, its keys say.

    alpaca     {"instruction": text, "input"?: text or null, "output": text, "system"?: text}    Stanford Alpaca
    messages   {"messages": [{"role": text, "content": text, "train"?: bool}, ...]}         OpenAI, Hugging Face
    sharegpt   {"conversations": [{"from": "human", "value": text}, ...], "system"?: text}  ShareGPT, FastChat, Accessory
    minima     [{"User": text, "Assistant": text}, ...]                                     MiniMA
    prompt     {"prompt": text, "completion": text}
    text       {"input": text}                                                              the Anyscale template

Other keys are left alone, except where the words would mean something else without them: images, tool_calls, tools,
functions, and history are refused. "train" (or "weight", 0 or 1) is for --train_on flagged. Test: pytest tests/unit/test_sft.py
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

from ..config import unknown_name
from .dialog import Dialog, Message

JSON_NAMES = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}


def parse(item: Any, where: str, insist: str | None = None) -> Dialog:
    """One parsed JSON value -> its dialog. ValueError says what is missing or of the wrong type, and where."""
    kind = insist or recognise(item)
    if kind is None or (kind != "minima" and not isinstance(item, dict)):
        raise ValueError(
            f'{where}: {name_of(item)}, not a record: write {{"instruction": ..., "output": ...}} or '
            '{"messages": [...]}'
        )
    if isinstance(item, dict) and (item.get("image") or item.get("images")):
        raise ValueError(f"{where}: it has an image, and only text is trained on: remove such records")
    messages = READERS[kind](item, where)
    if not any(m.role != "system" for m in messages):
        raise ValueError(f"{where}: a dialog without messages: remove the record")
    return Dialog(where, kind, tuple(messages))


def recognise(item: Any) -> str | None:
    """The format's name; alpaca for an object that looks like none, None for what is no record at all."""
    if isinstance(item, list):
        return "minima" if item and all(isinstance(turn, dict) for turn in item) else None
    if not isinstance(item, dict):
        return None
    if "messages" in item:
        return "messages"
    if "conversations" in item:
        return "sharegpt"
    if "instruction" in item or "output" in item:
        return "alpaca"
    if "prompt" in item and "completion" in item:
        return "prompt"
    return "text" if "input" in item else "alpaca"


def alpaca(item: dict, where: str) -> list[Message]:
    for key in ("instruction", "output"):
        if key not in item:
            keys = keys_of(item)
            raise ValueError(
                f'{where}: "{key}" is missing (keys there: {keys}): a record needs instruction and output, or messages, '
                "conversations, prompt and completion, or input alone"
            )
    refuse(item, ("history",), where, "earlier turns", "write the turns as messages")
    given = item.get("input")
    instruction, output = text_of(item, "instruction", where), text_of(item, "output", where)
    user = Message("user", instruction, input=text_of(item, "input", where) if given is not None else "")
    return with_system(item, [user, Message("assistant", output)], where)


def chat(list_key: str, role_key: str, text_key: str) -> Callable[[dict, str], list[Message]]:
    """The reader of {list_key: [{role_key: who, text_key: what}, ...]}."""

    def read(item: dict, where: str) -> list[Message]:
        said = item.get(list_key)
        if not isinstance(said, list):
            raise ValueError(f'{where}: "{list_key}" is {name_of(said)}, not a list of messages')
        refuse(item, ("tools", "functions"), where, "tools", "write them into the system message")
        return with_system(item, [message(m, f"{where}: message {i}") for i, m in enumerate(said, 1)], where)

    def message(m: Any, where: str) -> Message:
        if not isinstance(m, dict):
            raise ValueError(f'{where} is {name_of(m)}: write {{"{role_key}": ..., "{text_key}": ...}}')
        for key in (role_key, text_key):
            if key not in m:
                raise ValueError(f'{where}: "{key}" is missing (keys there: {keys_of(m)})')
        if m.get("tool_calls"):
            raise ValueError(f"{where}: it has tool_calls, which are not read: write the call into {text_key}")
        role = text_of(m, role_key, where)
        if role.lower() not in ROLES:
            raise ValueError(f"{where}: {unknown_name(role_key, role, tuple(ROLES))}")
        m = m | {text_key: joined(m[text_key], where)}
        return Message(ROLES[role.lower()], text_of(m, text_key, where), train_flag(m, where))

    return read


def with_system(item: dict, messages: list[Message], where: str) -> list[Message]:
    """The record's "system" in front, unless the messages begin with one."""
    system = item.get("system")
    if system is None or (messages and messages[0].role == "system"):
        return messages
    return [Message("system", text_of(item, "system", where))] * bool(system) + messages


def refuse(item: dict, keys: tuple[str, ...], where: str, what: str, remedy: str) -> None:
    """ValueError where the record has something under a key that nothing reads. "[]": a list that was put into text."""
    for key in keys:
        if item.get(key) and item[key] != "[]":
            raise ValueError(f'{where}: "{key}" holds {what}, which are not read: {remedy}, and remove the key')


def joined(content: Any, where: str) -> Any:
    """A content that comes in parts, [{"type": "text", "text": ...}, ...], as one text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = shown(part.get("type")) if isinstance(part, dict) else name_of(part)
            raise ValueError(f"{where}: a part of its content is {kind}, and only text is trained on: remove it")
    return "".join(text_of(part, "text", where) for part in content)


def train_flag(m: dict, where: str) -> bool | None:
    for key in ("train", "weight"):
        if m.get(key) is not None:
            if m[key] not in (0, 1):
                raise ValueError(f'{where}: "{key}" is {shown(m[key], ascii)}: true or false')
            return bool(m[key])
    return None


def minima(item: Any, where: str) -> list[Message]:
    if not isinstance(item, list):
        raise ValueError(f'{where}: {name_of(item)}, not a list of {{"User": ..., "Assistant": ...}}')
    messages = []
    for i, turn in enumerate(item, 1):
        for key, role in (("User", "user"), ("Assistant", "assistant")):
            if not isinstance(turn, dict) or key not in turn:
                raise ValueError(
                    f'{where}: turn {i}: "{key}" is missing: each turn is {{"User": ..., "Assistant": ...}}'
                )
            messages.append(Message(role, text_of(turn, key, f"{where}: turn {i}")))
    return messages


def prompt(item: dict, where: str) -> list[Message]:
    return [Message(role, text_of(item, key, where)) for role, key in (("user", "prompt"), ("assistant", "completion"))]


def text(item: dict, where: str) -> list[Message]:
    return [Message("text", text_of(item, "input", where))]


def text_of(item: dict, key: str, where: str) -> str:
    if key not in item:
        raise ValueError(f'{where}: "{key}" is missing (keys there: {keys_of(item)})')
    value = item[key]
    if not isinstance(value, str):
        remedy = 'write "", or remove the record' if value is None else "put it in quotes"
        raise ValueError(f'{where}: "{key}" is {name_of(value)}, not text: {remedy}')
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f'{where}: "{key}" holds half of a surrogate pair: write the character itself')
    return value


def keys_of(item: dict) -> str:
    return ", ".join(shown(key) for key in islice(item, 20)) or "none"


def shown(value: Any, words: Callable[[Any], str] = str) -> str:
    """A value from a file for an error's one line: not long, no line end, nothing that steers a terminal."""
    text = words(value)[:60]
    return text if text.isprintable() else ascii(text)


def name_of(value: Any) -> str:
    return JSON_NAMES.get(type(value), "null")


READERS = {
    "alpaca": alpaca,
    "messages": chat("messages", "role", "content"),
    "sharegpt": chat("conversations", "from", "value"),
    "minima": minima,
    "prompt": prompt,
    "text": text,
}
