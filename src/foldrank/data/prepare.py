"""Documents to memory-mapped token shards, once, at the tokenizer's speed: `prepare` writes a folder that is then read.

The folder holds `manifest.json`, `tokenizer/`, and for each split `SPLIT-00000.bin` (token ids, little-endian) and
`SPLIT-00000.ends` (where each document ends) and so on. It grows as `NAME.partial` beside its final place, with a
journal of what is safely on the disk, so that an interrupted preparation goes on there, and is renamed when whole: a
folder of the right name is always complete.
"""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import Timeout
from transformers import PreTrainedTokenizerBase

from foldrank.atomic import parents_of, refuse_existing, sync
from foldrank.data.cache import cache_folder, key_of, machine_lock
from foldrank.data.config import DataConfig, Split
from foldrank.data.corpus import Document, documents, is_prepared, no_token_format
from foldrank.data.files import Tally
from foldrank.data.manifest import FORMAT, JOURNAL, Journal, Manifest, Shard, SplitFiles, TokenizerFiles
from foldrank.data.prepared import PreparedData
from foldrank.data.shards import ShardWriter
from foldrank.data.shares import BLOCKS, SECONDS_TO_WAIT, Batch, Share, taken_together, tokenize_share
from foldrank.data.token_files import numbered_tokenizer
from foldrank.data.tokenizer import Encoder, encoded, pad_token, train_tokenizer
from foldrank.hf.tokenizers import end_token, largest_id, load_tokenizer
from foldrank.provenance import sha256_of_file

COMMIT_CHARACTERS = 1 << 24
"""Text between two entries of the journal: what an interruption can cost."""

TRAINING_CHARACTERS = 1 << 28
"""Text of which a tokenizer is trained, from the beginning of the training documents."""

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.ELOOP)

CHARS_PER_TOKEN = 200
"""Of text, at most; a token of common tokenizers stands for three to five."""

ALONE = Share()

Progress = Callable[[str, int, float | None], None]
"""Called with what is going on, the documents done, and the fraction of the whole; 1 at the end, None where unknown."""


def prepared(config: DataConfig, progress: Progress = lambda *_: None) -> PreparedData:
    """The prepared form of `config`: its source where that is prepared data, else from the cache, made if need be.

    The cache is keyed by the settings and by what local files hold; a data set on the hub counts as unchanged.

    Raises:
        ValueError: as `prepare`, and for a tokenizer named beside prepared data, which has its own.
    """
    if is_prepared(Path(config.source)):
        if config.token_format is not None:
            raise no_token_format(config)
        if config.tokenizer is not None:
            raise ValueError(f"{config.source} was prepared with a tokenizer of its own: name none (data.tokenizer)")
        return PreparedData(Path(config.source))
    folder = cache_folder() / "data" / key_of(config)
    if not folder.exists():
        try:
            prepare(config, folder, progress)
        except FileExistsError:
            if not folder.exists():  # another process was faster, otherwise
                raise
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise OSError(f"the cache cannot be written ({error}): name another with FOLDRANK_CACHE") from error
    return PreparedData(folder)


def prepare(
    config: DataConfig, out: Path, progress: Progress = lambda *_: None, *, share: Share = ALONE
) -> PreparedData:
    """Tokenizes the documents of `config` into the folder `out`; goes on where an earlier call was interrupted.

    The result is the same to the last byte, interrupted or not. A second process waits for the first.

    Args:
        config: names the source, and what is made of it.
        out: a new folder.
        progress: told how far it is.
        share: of this process, where several call it at once, which then share the work (shares.py).

    Raises:
        ValueError: for a corpus without text, one too small to be split, or a preparation begun with other settings.
        FileExistsError: where `out` exists.
    """
    if share.process > 0:
        return _help(config, out, progress, share)
    refuse_existing(out)
    with parents_of(out), _alone(out, progress):
        refuse_existing(out)
        work = out.with_name(f"{out.name}.partial")
        if not _is_ours(work):
            raise FileExistsError(f"{work} exists and is no preparation of foldrank: move it, or choose another --out")
        try:
            if not _is_finished(work, config):
                _write(config, work, progress, share)
        except BaseException as error:
            if (journal := Journal.read(work)) is None or not journal.documents:
                shutil.rmtree(work, ignore_errors=True)
            elif isinstance(error, OSError):
                raise OSError(f"{error}. What is done is kept in {work}: the same command goes on there") from error
            raise
        try:
            work.rename(out)
        except OSError as error:
            raise OSError(
                f"{out} appeared while it was prepared ({error.strerror}). All that was done is in {work}: move {out} "
                "away, and the same command gives it its name at once"
            ) from error
        sync(out.parent)
    return PreparedData(out)


def _help(config: DataConfig, out: Path, progress: Progress, share: Share) -> PreparedData:
    """Tokenizes a share for process 0, and waits for what that one makes of all."""
    work = out.with_name(f"{out.name}.partial")
    while not out.exists():
        journal = Journal.read(work)
        if journal is not None and journal.config == asdict(config) and (work / "tokenizer").exists():
            with suppress(FileNotFoundError), closing(documents(config)) as stream:  # it may need nothing more by now
                encoder = Encoder(load_tokenizer(work / "tokenizer"))
                tokenize_share(stream, encoder, share, work, journal.documents)
            progress("waiting for process 0", 0, None)
            while work.exists():
                time.sleep(SECONDS_TO_WAIT)
            break
        time.sleep(SECONDS_TO_WAIT)
    return PreparedData(out)


def _is_ours(work: Path) -> bool:
    """Whether an unfinished folder may be gone on with, or is not there."""
    known = Journal.read(work) is not None or _manifest_config(work) is not None
    return known or not os.path.lexists(work)


def _is_finished(work: Path, config: DataConfig) -> bool:
    """Whether it only waits for its name, which something else had."""
    return Journal.read(work) is None and _manifest_config(work) == config


def _manifest_config(work: Path) -> DataConfig | None:
    try:
        return Manifest.read(work).config
    except ValueError:
        return None


@contextmanager
def _alone(out: Path, progress: Progress) -> Iterator[None]:
    """Keeps other processes from preparing the same folder meanwhile."""
    lock = machine_lock("prepare", out.resolve())
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("waiting for another process that prepares the same folder", 0, None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write(config: DataConfig, work: Path, progress: Progress, share: Share) -> None:
    journal = _begin(config, work)
    tokenizer = _tokenizer(config, work, progress)
    encoder = Encoder(tokenizer)
    tally = Tally()
    with (
        ShardWriter(work, "train", encoder.dtype, journal.shards["train"]) as train,
        ShardWriter(work, "validation", encoder.dtype, journal.shards["validation"]) as validation,
        closing(documents(config, tally)) as stream,
    ):
        writers: dict[Split, ShardWriter] = {"train": train, "validation": validation}
        text = _skip(stream, journal, work, progress)
        batches = _batches(stream, encoder, share, work, journal, progress)
        done = _tokenize(batches, writers, journal, text, work, progress)
        for writer in writers.values():
            writer.close()
        shards: dict[Split, list[Shard]] = {split: writer.state() for split, writer in writers.items()}
    for split, parts in shards.items():
        if not parts:
            raise _no_text(config, split, done, tally)
    splits: dict[Split, SplitFiles] = {split: SplitFiles.of(parts) for split, parts in shards.items()}
    _check_encoding(tokenizer, done, sum(part.tokens for part in splits.values()), tally)
    manifest = Manifest(
        config=config,
        tokenizer=TokenizerFiles(
            name=config.tokenizer,
            files={file.name: sha256_of_file(file) or "" for file in sorted((work / "tokenizer").iterdir())},
        ),
        vocab_size=largest_id(tokenizer) + 1,
        end_token=encoder.end,
        pad_token=pad_token(tokenizer),
        dtype="<u2" if encoder.dtype.itemsize == 2 else "<u4",
        documents=done,
        bytes_read=tally.bytes,
        bytes_lost=tally.lost_bytes,
        skipped=dict(sorted(tally.skipped.items())),
        text_sha256=text.hexdigest(),
        splits=splits,
    )
    manifest.write(work)
    shutil.rmtree(work / BLOCKS, ignore_errors=True)
    (work / JOURNAL).unlink()
    progress("tokenizing", done, 1.0)


def _check_encoding(tokenizer: PreTrainedTokenizerBase, documents: int, tokens: int, tally: Tally) -> None:
    """Refuses text of which the tokenizer knows next to nothing; each document has an end token in any case."""
    if CHARS_PER_TOKEN * (tokens - documents) < tally.characters:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} makes {tokens - documents:,} tokens of {tally.characters:,} "
            "characters: it drops what it does not know; take one that was made for this text"
        )


def _batches(
    stream: Iterator[Document], encoder: Encoder, share: Share, work: Path, journal: Journal, progress: Progress
) -> Generator[Batch]:
    if share.processes == 1:
        return encoded(stream, encoder)
    return taken_together(
        stream,
        encoder,
        share,
        work,
        journal.documents,
        lambda process: progress(f"waiting for process {process} of {share.processes}", 0, None),
    )


def _tokenize(
    encoded_batches: Generator[Batch],
    writers: dict[Split, ShardWriter],
    journal: Journal,
    text: Any,
    work: Path,
    progress: Progress,
) -> int:
    """Writes the documents that are left, with an entry of the journal now and then; returns how many there are."""
    done, uncommitted = journal.documents, 0
    with closing(encoded_batches) as batches:
        for batch in batches:
            for document, ids in batch:
                writers[document.split].write(ids)
                text.update(document.digest)
                uncommitted += document.size
            done, fraction = done + len(batch), batch[-1][0].fraction
            if uncommitted >= COMMIT_CHARACTERS:
                state = {split: writer.state() for split, writer in writers.items()}
                replace(journal, documents=done, text_sha256=text.hexdigest(), shards=state).write(work)
                uncommitted = 0
            progress("tokenizing", done, fraction and min(fraction, 0.999))
    return done


def _begin(config: DataConfig, work: Path) -> Journal:
    journal, settings = Journal.read(work), asdict(config)
    if journal is not None and (journal.format, journal.config) == (FORMAT, settings):
        return journal
    if journal is not None and journal.documents:
        raise ValueError(f"{work} holds a preparation begun with other settings: delete it or choose another folder")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    journal = Journal(config=settings)
    journal.write(work)
    return journal


def _skip(stream: Iterator[Document], journal: Journal, work: Path, progress: Progress) -> Any:
    """Passes over the documents that are done; returns the running hash of all documents."""
    text = hashlib.sha256()
    for number in range(journal.documents):
        document = next(stream, None)
        if document is not None:
            text.update(document.digest)
            if number % 1000 == 0:
                progress("finding the place to go on", number, document.fraction)
    if journal.documents:
        if text.hexdigest() != journal.text_sha256:
            raise ValueError(f"the text has changed since {work} was begun: delete that folder and begin again")
        progress("finding the place to go on", journal.documents, 1.0)
    return text


def _tokenizer(config: DataConfig, work: Path, progress: Progress) -> PreTrainedTokenizerBase:
    saved = work / "tokenizer"
    if saved.exists():
        return load_tokenizer(saved)
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        end_token(tokenizer)  # refused while it still has the name that the user knows
    elif config.token_format is not None:
        tokenizer = numbered_tokenizer(config)
    else:
        tokenizer = train_tokenizer(_training_texts(config, progress), config.vocab_size)
    try:
        tokenizer.save_pretrained(work / "tokenizer.saving")
    except Exception as error:  # the tokenizers library says nothing more exact, of a full disk for one
        raise OSError(f"the tokenizer cannot be written: {error}") from error
    (work / "tokenizer.saving").rename(saved)
    # As it will be read, so that a preparation that goes on has the same one.
    return load_tokenizer(saved)


def _training_texts(config: DataConfig, progress: Progress) -> Iterator[str]:
    read = done = 0
    tally = Tally()
    for document in documents(config, tally):
        if document.split == "train":
            yield document.text
            read, done = read + len(document.text), done + 1
            if done % 100 == 0:
                fraction = None if document.fraction is None else max(document.fraction, read / TRAINING_CHARACTERS)
                progress("training the tokenizer", done, fraction and min(fraction, 0.999))
            if read >= TRAINING_CHARACTERS:
                break
    if not done:
        raise _no_text(config, "train", 0, tally)
    progress("training the tokenizer", done, 1.0)


def _no_text(config: DataConfig, split: str, done: int, tally: Tally) -> ValueError:
    left_out = ", ".join(f"{count} {reason}" for reason, count in tally.skipped.items())
    return ValueError(
        f"no text for the {split} split ({done} documents; left out: {left_out or 'none'}) in {config.source}: give "
        "more text, or another validation_fraction"
    )
