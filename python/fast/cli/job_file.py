"""job.json keeps the options of a run in its folder, signed, so that `--resume` builds the same
network and data again, and never runs a stranger's code."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

from fast.cli.options import Parser, flag
from fast.cli.values import model_file
from fast.errors import printable
from fast.files import JOB_FILE, read_json, to_json, writing

KEY_BYTES = 32
# Entries of a job file that are no options.
MODEL_HASH, SIGNATURE = "model_hash", "signature"
# Options that name files or data sets, and those that may name a file.
FILES = ("weights", "data", "source", "source_inputs", "card")
PATHS = (*FILES, "model")


def write_job(folder: Path, options: dict[str, Any]) -> None:
    """Keep the options of a run, with files by their absolute paths.

    Raises:
        FileExistsError: the folder has one already.
    """
    paths = {name: absolute(options[name]) for name in PATHS if name in options}
    facts = {**options, **paths, MODEL_HASH: _model_hash(paths["model"])}
    job = json.loads(to_json(facts))
    text = to_json(job | {SIGNATURE: _sign(job)}, indent=2) + "\n"
    path = folder / JOB_FILE
    file = path.open("x")
    try:
        with writing(path), file:
            file.write(text)
    except OSError:  # a full disk; an empty file would be taken for that of a run
        path.unlink()
        raise


def replace_job(folder: Path, options: dict[str, Any]) -> None:
    """Keep the network and data of something that is made from a run, before it is saved, so that
    it can be used without --model, like the run itself. One that was there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOB_FILE).unlink(missing_ok=True)
    write_job(folder, options)


def read_job(folder: Path, option: str, parser: Parser, named: bool) -> dict[str, Any]:
    """The options of a run, read as if they were typed on the command line.

    Args:
        option: the option that named the folder, for messages.
        parser: the parser of the command that wrote the file.
        named: the model is named on this command line, so that the recorded one does not run.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no run of `fast finetune`.
        ValueError: the file is damaged; or its model is a stranger's code, or has changed, and is
            not named on this command line.
    """
    file = folder / JOB_FILE
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {folder}: no such folder")
    if not file.is_file():
        raise FileNotFoundError(f"{option} {folder}: has no {JOB_FILE}; not a run of fast finetune")
    job = read_json(file)
    signature, own = str(job.pop(SIGNATURE, None)), _sign(job)
    trusted = own is not None and hmac.compare_digest(signature.encode(), own.encode())
    model, model_hash = job.get("model"), job.pop(MODEL_HASH, None)
    if not named and not trusted:
        raise ValueError(
            f"{option} {folder}: was not started by you on this machine, and a network is code: "
            f"look at it, and name it: --model '{printable(model)}'"
        )
    try:
        options = parser.read(_argv(job, parser))
    except ValueError as error:
        raise ValueError(f"{file} is damaged or was changed: {error}") from error
    now = None if named else _model_hash(options.get("model"))
    if not named and model_hash and now is None:
        raise FileNotFoundError(
            f"{option} {folder}: the file of its network is not there any more: name it where it "
            f"is now, --model FILE.py:FACTORY, in place of {printable(model)}"
        )
    if not named and model_hash != now:
        raise ValueError(
            f"{option} {folder}: the file of its network has changed since; to run it as it is "
            f"now, name it: --model '{printable(model)}'"
        )
    return options


def check_files(option: str, folder: Path, options: dict[str, Any]) -> None:
    """Refuse to go on with files that have moved since the run.

    Args:
        option: the option that named the folder, for messages.
        options: what the run recorded, under what is named on this command line.

    Raises:
        FileNotFoundError: a file is not there; the message says how to name it where it is now.
    """
    for name in FILES:
        value = options.get(name)
        if value and is_gone(value):
            raise FileNotFoundError(
                f"{option} {folder}: {printable(value)} is not there any more: name it where it "
                f"is now, {flag(name)} PATH"
            )


def is_gone(value: str) -> bool:
    """Whether a job names a file that is not there; names of data sets are no files."""
    return os.path.isabs(value) and not os.path.exists(value)


def _argv(job: dict[str, Any], parser: Parser) -> list[str]:
    """`{"lr": 0.1, "mean": [0.5, 0.5]}` -> `["--lr=0.1", "--mean=0.5,0.5"]`."""
    argv = []
    for name, value in job.items():
        if isinstance(value, bool):
            off = "--no-" + flag(name).removeprefix("--")
            argv += [flag(name)] if value else [off] * (off in parser.flags)
        elif isinstance(value, list):
            argv.append(f"{flag(name)}={','.join(map(str, value))}")
        elif isinstance(value, dict):
            raise ValueError(f"{name} is {value}")
        elif value is not None:
            argv.append(f"{flag(name)}={value}")
    return argv


def _model_hash(spec: str | None) -> str | None:
    """Hash of the file that `path/file.py:Factory` names; None for a library's network."""
    path = model_file(spec)
    if path is None or not path.is_file():
        return None
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def absolute(name: str | None) -> str | None:
    """The absolute path of a file, so that --resume works from anywhere; other names stay."""
    if not name:
        return name
    file = model_file(name)
    if file is not None:
        return f"{os.path.realpath(file)}:{name.partition('.py:')[2]}"
    path = os.path.expanduser(name)
    return os.path.realpath(path) if os.path.exists(path) else name


def _sign(job: dict[str, Any]) -> str | None:
    """A signature by a key that only this user has; None where no key can be kept."""
    key = _key()
    text = json.dumps(job, sort_keys=True).encode()
    return None if key is None else hmac.new(key, text, "sha256").hexdigest()


def _key() -> bytes | None:
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(state).expanduser() / "fast" / "key"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent) as whole:  # only the user may read it
                whole.write(secrets.token_bytes(KEY_BYTES))
                whole.flush()
                os.link(whole.name, path)
    except FileExistsError:  # another run has just made it
        pass
    except (OSError, RuntimeError):  # no home, or one that cannot be written to
        return None
    key = path.read_bytes()
    return key if len(key) == KEY_BYTES else None
