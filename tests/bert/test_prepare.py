import ast
import errno
import gzip
import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetGenerationError

from sharded_lamb.bert import corpus
from sharded_lamb.bert import prepare as module
from sharded_lamb.bert.config import RunConfig, TokenizerConfig, build_config
from sharded_lamb.bert.corpus import check_files, count_documents, find_files
from sharded_lamb.bert.packing import Packer
from sharded_lamb.bert.prepare import _sampled, prepare
from sharded_lamb.bert.shards import PackedSamples, read_manifest
from sharded_lamb.bert.tokenizer import encode, load_tokenizer, save_tokenizer, train_tokenizer, vocabulary_of
from tests import fork_server
from tests.bert.conftest import LENGTH, paragraphs


def configured(tree: dict[str, Any], folder: Path, *overrides: str, **data: Any) -> RunConfig:
    changed = {**tree, "data": {**tree["data"], "prepared": str(folder / "prepared"), **data}}
    return build_config(changed, overrides)


def all_rows(folder: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    samples = PackedSamples(folder, "train")
    return samples.rows(np.arange(len(samples)))


def write_formats(folder: Path) -> dict[str, str]:
    """The same documents as every format; what to give as data.source."""
    import datasets

    texts = paragraphs()[:60]
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("\n\n".join(texts[:30]))
    (folder / "text" / "b.txt").write_text("\n\n".join(texts[30:]))
    with (folder / "c.jsonl").open("w") as out:
        out.writelines(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
    dataset = datasets.Dataset.from_dict({"text": texts})
    dataset.to_parquet(str(folder / "d.parquet"))
    dataset.save_to_disk(str(folder / "e"))
    return {
        "text glob": str(folder / "text" / "*.txt"),
        "text folder": str(folder / "text"),
        "jsonl": str(folder / "c.jsonl"),
        "fsspec URL": f"file://{folder / 'c.jsonl'}",
        "parquet": str(folder / "d.parquet"),
        "arrow folder": str(folder / "e"),
    }


def test_every_format_gives_the_same_documents(tree: dict[str, Any], tmp_path: Path) -> None:
    sources = write_formats(tmp_path)
    contents = {}
    for name, source in sources.items():
        config = configured(tree, tmp_path, "tokenizer.vocab_size=512", source=[source], heldout_fraction=0.0)
        folder = prepare(config, LENGTH)
        tokenizer = load_tokenizer(folder / "tokenizer")
        contents[name] = tokenizer.decode(all_rows(folder).ravel(), skip_special_tokens=True)
        assert read_manifest(folder).documents == 60
    by_length = {name: len(content) for name, content in contents.items()}
    # Two text files are two units, so a row ends early between them; the words are the same.
    assert len(set(contents.values())) <= 2, by_length
    assert len({"".join(content.split()) for content in contents.values()}) == 1, by_length


def test_the_configured_format_holds_for_files_without_a_suffix(tree: dict[str, Any], tmp_path: Path) -> None:
    """As Spark writes them; without data.format they are text."""
    (tmp_path / "part-00000").write_text("".join(json.dumps({"text": t}) + "\n" for t in paragraphs()[:20]))

    def documents(form: str) -> int | str:
        config = configured(tree, tmp_path, source=[str(tmp_path / "part-00000")], format=form)
        (file,) = find_files(config.data, tmp_path)
        return count_documents(file)

    assert documents("jsonl") == 20
    assert documents("auto") == documents("text") == 1
    assert "part-00000" in str(documents("parquet")) or not isinstance(documents("parquet"), int)


def test_a_folders_compressed_files_are_read(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in paragraphs()[:20])
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "in" / "b.txt").write_text("one\n\ntwo")
    (tmp_path / "in" / "c.tar.gz").write_bytes(b"")
    files = find_files(configured(tree, tmp_path, source=[str(tmp_path / "in")]).data, tmp_path / "cache")
    assert [Path(file.path).name for file in files] == ["a.jsonl.gz", "b.txt"]
    assert [count_documents(file) for file in files] == [20, 2]


def test_two_runs_that_train_the_tokenizer_at_once_share_it(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run's is there once this one is trained."""
    config, save = configured(tree, tmp_path), module.save_tokenizer

    def save_beside_another(tokenizer: Any, folder: Path, *options: Any) -> None:
        save(tokenizer, folder, *options)
        save(tokenizer, folder.with_name(folder.name.removeprefix(".").rsplit(".", 1)[0]), *options)

    monkeypatch.setattr(module, "save_tokenizer", save_beside_another)
    folder = prepare(config, LENGTH)
    assert read_manifest(folder).documents > 0
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_the_trained_tokenizer_and_the_rows_are_the_same_in_every_run(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    first = prepare(configured(tree, tmp_path / "1"), LENGTH)
    second = prepare(configured(tree, tmp_path / "2"), LENGTH)
    assert (first / "tokenizer" / "tokenizer.json").read_bytes() == (
        second / "tokenizer" / "tokenizer.json"
    ).read_bytes()
    assert np.array_equal(all_rows(first), all_rows(second))


def test_prepare_in_parallel_and_interrupted_gives_the_same_rows(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "get_context", lambda method: fork_server.context()
    )  # spawning imports all anew
    units = {"unit_documents": 100}
    alone = prepare(configured(tree, tmp_path / "1", workers=1, **units), LENGTH)
    both = prepare(configured(tree, tmp_path / "2", workers=2, **units), LENGTH)
    expected = all_rows(alone)
    assert len(list((alone / "units").iterdir())) > 2
    assert np.array_equal(all_rows(both), expected)

    (alone / "manifest.json").unlink()
    (alone / "units" / "00001.json").unlink()
    (alone / "train-00001.bin").write_bytes(b"cut short")
    kept = (alone / "train-00000.bin").stat().st_mtime_ns
    assert prepare(configured(tree, tmp_path / "1", workers=1, **units), LENGTH) == alone
    assert np.array_equal(all_rows(alone), expected)
    assert (alone / "train-00000.bin").stat().st_mtime_ns == kept, "a finished unit was done again"


def test_another_tokenizer_at_the_same_path_makes_another_folder(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    """Also where the first one was interrupted: its units have the ids of its tokenizer."""
    tokenizer, folders = tmp_path / "tokenizer", set()
    for size in (300, 400):
        settings = TokenizerConfig(vocab_size=size, min_frequency=2)
        save_tokenizer(train_tokenizer(paragraphs(), settings), tokenizer, settings.lowercase, LENGTH)
        folder = prepare(configured(tree, tmp_path, f"tokenizer.path={tokenizer}"), LENGTH)
        assert read_manifest(folder).vocab_size == size
        (folder / "manifest.json").unlink()
        folders.add(folder)
    assert len(folders) == 2


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_another_text_of_the_same_size_makes_another_folder(
    scheme: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    path, folders = tmp_path / "a.txt", set()
    texts = paragraphs()
    for number, text in enumerate((texts, texts[::-1], texts[::-1])):
        path.write_text("\n\n".join(text))
        os.utime(path, (0, 1_000_000_000 + min(number, 1)))
        config = configured(tree, tmp_path, "tokenizer.vocab_size=512", source=[f"{scheme}{path}"])
        folders.add(prepare(config, LENGTH))
    assert len(folders) == 2


def test_the_manifest_says_what_the_rows_are(tree: dict[str, Any], tmp_path: Path) -> None:
    folder = prepare(configured(tree, tmp_path), LENGTH)
    manifest, rows = read_manifest(folder), all_rows(folder)
    vocabulary = vocabulary_of(load_tokenizer(folder / "tokenizer"))
    assert manifest.sequence_length == rows.shape[1] == LENGTH
    assert manifest.train_tokens == (rows != vocabulary.pad).sum()
    assert manifest.fill > 0.95
    assert manifest.dtype == "uint16"
    counts = np.bincount(rows.ravel(), minlength=vocabulary.size)[5:]
    share = counts[counts > 0] / counts.sum()
    assert manifest.unigram_entropy == pytest.approx(-(share * np.log(share)).sum(), rel=1e-12)
    assert len(PackedSamples(folder, "heldout")) > 0


def test_another_setting_gets_another_folder(tree: dict[str, Any], tmp_path: Path) -> None:
    folders = {
        prepare(configured(tree, tmp_path), LENGTH),
        prepare(configured(tree, tmp_path), 16),
        prepare(configured(tree, tmp_path, nsp=True), LENGTH),
        prepare(configured(tree, tmp_path, "tokenizer.vocab_size=512"), LENGTH),
        prepare(configured(tree, tmp_path, heldout_fraction=0.2), LENGTH),
    }
    assert len(folders) == 5


def test_a_pretrained_tokenizer_is_taken_by_path(tree: dict[str, Any], tmp_path: Path) -> None:
    trained = prepare(configured(tree, tmp_path / "1"), LENGTH)
    config = configured(tree, tmp_path / "2")
    config = replace(config, tokenizer=replace(config.tokenizer, path=str(trained / "tokenizer")))
    assert np.array_equal(all_rows(prepare(config, LENGTH)), all_rows(trained))
    config = replace(config, tokenizer=replace(config.tokenizer, path=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"tokenizer\.path='.*nowhere': no such folder"):
        prepare(config, LENGTH)


def test_special_pieces_written_in_a_text_stay_ordinary_text(tree: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(prepare(configured(tree, tmp_path), LENGTH) / "tokenizer")
    (ids,) = encode(tokenizer, ["a [MASK] and a [SEP] and [CLS]"])
    assert not set(ids) & {tokenizer.mask_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id}


def test_a_run_continues_with_a_corpus_that_was_copied_or_touched(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    """Its rows count, and neither its place nor its time."""
    text = "\n\n".join(paragraphs())
    digests = []
    for name, content in (("a", text), ("b", text), ("c", text.replace("e", "a", 1))):
        (tmp_path / f"{name}.txt").write_text(content)
        os.utime(tmp_path / f"{name}.txt", (1.0, 2.0 + len(digests)))
        config = configured(tree, tmp_path / name, source=[str(tmp_path / f"{name}.txt")])
        digests.append(read_manifest(prepare(config, LENGTH)).digest())
    assert digests[0] == digests[1] != digests[2]


def test_folders_of_earlier_versions_keep_their_digest(tree: dict[str, Any], tmp_path: Path) -> None:
    manifest = read_manifest(prepare(configured(tree, tmp_path / "p"), LENGTH))
    before = {key: value for key, value in asdict(manifest).items() if key != "rows_sha256"}
    expected = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:16]
    assert replace(manifest, rows_sha256="").digest() == expected != manifest.digest()


class TestBadInput:
    def test_missing(self, tree: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"data\.source '.*absent\.txt': no such file"):
            prepare(configured(tree, tmp_path, source=[str(tmp_path / "absent.txt")]), LENGTH)

    def test_unknown_format(self, tree: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "a.docx").write_text("x")
        with pytest.raises(ValueError, match=r"unknown format '\.docx'; set data\.format"):
            prepare(configured(tree, tmp_path, source=[str(tmp_path / "a.docx")]), LENGTH)

    def test_broken_and_empty_files_are_named_and_counted_or_skipped(
        self, tree: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "good.txt").write_text("\n\n".join(paragraphs()))
        (tmp_path / "empty.txt").write_text("")
        (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
        source = [str(tmp_path / "*")]
        with pytest.raises(ValueError, match="2 of 3 input files are broken or empty") as error:
            prepare(configured(tree, tmp_path / "p", source=source), LENGTH)
        assert "empty.txt: contains no document" in str(error.value)
        assert "torn.parquet" in str(error.value)
        assert "data.on_bad=skip" in str(error.value)
        folder = prepare(configured(tree, tmp_path / "p", source=source, on_bad="skip"), LENGTH)
        assert "skipped: 2 of 3" in capfd.readouterr().out
        assert read_manifest(folder).documents == len(paragraphs())

    @pytest.mark.parametrize(
        "column",
        [pa.array([b"x"]), pa.array([["x"]]), pa.array([1]), pa.array([None], pa.null())],
        ids=["bytes", "lists", "numbers", "nulls"],
    )
    def test_a_column_that_holds_no_strings_is_refused(
        self, column: Any, tree: dict[str, Any], tmp_path: Path
    ) -> None:
        """Its documents would be dropped, and counted."""
        pq.write_table(pa.table({"text": column}), tmp_path / "odd.parquet")
        (tmp_path / "good.txt").write_text("\n\n".join(paragraphs()))
        source = [str(tmp_path / "good.txt"), str(tmp_path / "odd.parquet")]
        with pytest.raises(ValueError, match=r"odd.parquet: column 'text' holds .*, expected strings"):
            prepare(configured(tree, tmp_path / "p", source=source), LENGTH)

    def test_nulls_are_counted_as_dropped(self, tree: dict[str, Any], tmp_path: Path) -> None:
        texts = paragraphs()
        for name, rows in (("with", [None, *texts, None, None]), ("without", texts)):
            pq.write_table(pa.table({"text": rows}), tmp_path / f"{name}.parquet")
        counts = {}
        for name in ("with", "without"):
            source = [str(tmp_path / f"{name}.parquet")]
            manifest = read_manifest(prepare(configured(tree, tmp_path / name, source=source), LENGTH))
            counts[name] = manifest.documents, manifest.dropped_documents
        kept, dropped = counts["without"]
        assert counts["with"] == (kept + 3, dropped + 3)

    def test_a_full_disk_is_no_fault_of_a_file(self, tree: dict[str, Any], tmp_path: Path) -> None:
        """data.on_bad=skip would leave out what is whole."""
        (tmp_path / "good.txt").write_text("\n\n".join(paragraphs()))
        source = [str(tmp_path / "good.txt"), "builtin"]
        config = configured(tree, tmp_path / "p", source=source, on_bad="skip")
        full = OSError(errno.ENOSPC, "No space left on device")
        wrapped = DatasetGenerationError("An error occurred while generating the dataset")
        wrapped.__cause__ = full
        for error in (full, wrapped):
            with (
                mock.patch("datasets.load_dataset", side_effect=error),
                pytest.raises(OSError, match=r"No space left on device, as .*good.txt was read"),
            ):
                prepare(config, LENGTH)

    def test_an_empty_corpus(self, tree: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "empty.txt").write_text("")
        (tmp_path / "blank.txt").write_text("\n\n\n")
        for name, on_bad, message in (
            ("empty.txt", "skip", "the corpus is empty"),
            ("empty.txt", "error", "1 of 1 input files"),
            ("blank.txt", "skip", "the corpus is empty"),
        ):
            config = configured(tree, tmp_path, source=[str(tmp_path / name)], on_bad=on_bad)
            with pytest.raises(ValueError, match=message):
                prepare(config, LENGTH)

    def test_a_missing_column(self, tree: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"body": "words"}\n')
        with pytest.raises(ValueError, match=r"no column 'text' \(data\.text_field\) among \['body'\]"):
            prepare(configured(tree, tmp_path, source=[str(tmp_path / "a.jsonl")]), LENGTH)

    def test_text_files_have_no_fields(self, tree: dict[str, Any], tmp_path: Path) -> None:
        """data.text_field names the column of the other files."""
        (tmp_path / "a.jsonl").write_text('{"body": "from json"}\n')
        (tmp_path / "b.txt").write_text("from text\n")
        sources = [str(tmp_path / name) for name in ("a.jsonl", "b.txt")]
        config = configured(tree, tmp_path, "data.text_field=body", source=sources)
        files = find_files(config.data, tmp_path / "cache")
        assert [text.strip() for file in files for text in file.open()[0:1]] == ["from json", "from text"]

    def test_a_vocabulary_larger_than_the_corpus_allows(self, tree: dict[str, Any], tmp_path: Path) -> None:
        config = configured(tree, tmp_path, "tokenizer.vocab_size=60000")
        with pytest.raises(
            ValueError, match=r"vocab_size=60000: this corpus gives \d+ pieces .* use \d+ or fewer"
        ):
            prepare(config, LENGTH)

    def test_a_corpus_with_less_than_eight_pieces(self) -> None:
        with pytest.raises(ValueError, match=r"this corpus gives 7 pieces .*; use more text$"):
            train_tokenizer(["a a a"], TokenizerConfig(vocab_size=16))

    def test_a_corpus_with_more_characters_than_pieces(self) -> None:
        letters = ["abcdefghijkl"]  # each begins and continues words: 24 pieces beside 5 special ones
        message = r"vocab_size=16: the characters of this corpus alone take 29 pieces; use 32 or more$"
        with pytest.raises(ValueError, match=message):
            train_tokenizer(letters, TokenizerConfig(vocab_size=16))
        train_tokenizer(letters * 3, TokenizerConfig(vocab_size=32, min_frequency=2))

    def test_a_shard_cut_short(self, tree: dict[str, Any], tmp_path: Path) -> None:
        config = configured(tree, tmp_path)
        folder = prepare(config, LENGTH)
        shard = folder / "train-00000.bin"
        shard.write_bytes(shard.read_bytes()[:-2])
        with pytest.raises(
            ValueError, match=r"train-00000\.bin: expected \d+ bytes, but it is \d+ bytes long"
        ):
            prepare(config, LENGTH)


def test_words_that_become_unknown_for_their_length_train_no_pieces() -> None:
    """One of 2,000,000 characters took over 90 seconds."""
    settings = TokenizerConfig(vocab_size=200, min_frequency=2)
    texts = paragraphs()
    word, longer = "qz" * 50, "qz" * 51
    vocabulary = train_tokenizer(texts, settings).get_vocab()
    assert train_tokenizer([*texts, *[longer] * 50], settings).get_vocab() == vocabulary
    tokenizer = train_tokenizer([*texts, *[word] * 50], settings)
    assert tokenizer.get_vocab() != vocabulary
    assert tokenizer.encode(longer, add_special_tokens=False).tokens == ["[UNK]"]
    assert "##qz" in tokenizer.encode(word, add_special_tokens=False).tokens


def test_packed_documents_keep_their_pieces_in_order(tree: dict[str, Any], tmp_path: Path) -> None:
    vocabulary = vocabulary_of(load_tokenizer(prepare(configured(tree, tmp_path), LENGTH) / "tokenizer"))
    documents = [list(range(10, 10 + n)) for n in (1, 5, 100, 2, 30, 30, 61, 0, 7)]
    for pack in (True, False):
        packer = Packer(vocabulary, 32, nsp=False, pack=pack)
        for document in documents:
            packer.add(document)
        rows = packer.rows()
        ordinary = [int(i) for i in rows.ravel() if i >= 10]
        assert ordinary == [i for document in documents for i in document]
        begins = (rows == vocabulary.cls).sum(1)
        assert (begins == (rows == vocabulary.sep).sum(1)).all()
        assert (begins == 1).all() != pack
        assert packer.dropped == 1


def test_pairs_cut_one_document_at_a_sentence_end(tree: dict[str, Any], tmp_path: Path) -> None:
    vocabulary = vocabulary_of(load_tokenizer(prepare(configured(tree, tmp_path), LENGTH) / "tokenizer"))
    stop = vocabulary.sentence_end[0]
    packer = Packer(vocabulary, 32, nsp=True, pack=True)
    packer.add([50] * 13 + [stop] + [51] * 15)
    packer.add([50] * 3)
    (row,) = packer.rows()
    assert row.tolist() == [vocabulary.cls, *[50] * 13, stop, vocabulary.sep, *[51] * 15, vocabulary.sep]
    assert packer.dropped == 1


def test_the_tokenizer_is_trained_on_a_sample_of_about_the_wanted_size(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    config = configured(tree, tmp_path)
    (file,) = check_files([f := find_files(config.data, tmp_path)[0]], [count_documents(f)], "error")
    every = list(_sampled([file], None))
    assert len(every) == file.documents == len(paragraphs())
    some = list(_sampled([file], 200))
    assert abs(len(some) - 200) < 5 * 200**0.5
    rest = iter(every)
    assert all(text in rest for text in some), "not in the corpus' order"
    assert list(_sampled([file], 10**6)) == every


NESTED = '''"""The module, which is long enough to be prose."""
class Outer:
    """The class, which is long enough to be prose."""
    def method(self):
        """A method, which is long enough to be prose."""
        async def inner():
            """A function in it, which is long enough to be prose."""
if True:
    pass
elif False:
    for _ in ():
        def looped():
            """In a loop in an elif, which is long enough to be prose."""
    else:
        def after():
            """Behind a loop, which is long enough to be prose."""
try:
    pass
except OSError:
    def handler():
        """In a handler, which is long enough to be prose."""
finally:
    with open("x"):
        def last():
            """In a with in a finally, which is long enough to be prose."""
match 1:
    case 1:
        def matched():
            """In a case, which is long enough to be prose."""
def short():
    """A label."""
'''


def test_docstrings_come_in_the_order_of_a_walk_over_all_nodes() -> None:
    """The corpus, and with it every loss that is published, depends on their order."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    walked = [ast.get_docstring(node) for node in ast.walk(ast.parse(NESTED)) if isinstance(node, kinds)]
    assert len(walked) == 10
    assert list(corpus._docstrings(NESTED)) == [text for text in walked if text != "A label."]
