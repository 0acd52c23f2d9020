"""The metadata of a GGUF file is parsed once for each load, into what the library itself reads."""

import threading

import gguf
import numpy as np
import pytest

import fastinterp
from fastinterp.errors import ModelSourceError
from fastinterp.load.gguf_reader import Reader, read_once


@pytest.fixture
def path(tmp_path):
    """A file with metadata of every kind, and one tensor."""
    path = tmp_path / "metadata.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("strings", ["", "a", "Größe", "two words", "\U0001f600" * 40])
    writer.add_array("integers", list(range(-3, 700)))
    writer.add_array("floats", [0.5, -1e30, 3.0])
    writer.add_array("booleans", [True, False, True])
    writer.add_array("nested", [["x", "y"], ["z"]])
    writer.add_string("string", "some text")
    writer.add_uint64("large", 2**40)
    writer.add_bool("yes", True)
    writer.add_tensor("W", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def parsed(monkeypatch):
    """Counts how often somebody goes through the metadata of a file."""
    count = []
    original = gguf.GGUFReader._build_fields

    def counted(self, *args):
        count.append(type(self).__name__)
        return original(self, *args)

    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", counted)
    return count


def test_it_reads_what_the_library_reads(path):
    expected, got = gguf.GGUFReader(path), Reader(path)
    assert list(got.fields) == list(expected.fields)
    for name, field in expected.fields.items():
        ours = got.fields[name]
        assert (ours.offset, ours.types, ours.data) == (field.offset, field.types, field.data), name
        assert ours.contents() == field.contents(), name
        assert [p.tolist() for p in ours.parts] == [p.tolist() for p in field.parts], name
        assert [p.dtype for p in ours.parts] == [p.dtype for p in field.parts], name
    assert got.fields["strings"].contents()[2] == "Größe"
    assert np.array_equal(got.tensors[0].data, np.arange(12).reshape(3, 4))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_metadata_that_breaks_off_is_an_error_of_the_source(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelSourceError, match=r"metadata\.gguf.*cannot be read"):
        fastinterp.load(path)


def test_within_the_block_the_file_is_open_already_and_others_are_not(path, tmp_path, parsed):
    other = tmp_path / "other.gguf"
    other.write_bytes(path.read_bytes())
    original = gguf.GGUFReader
    with read_once(path) as reader:
        assert gguf.GGUFReader(str(path)) is reader
        assert type(gguf.GGUFReader(other)) is original
        assert type(gguf.GGUFReader(path, "c")) is original
    assert gguf.GGUFReader is original
    assert parsed == ["Reader", "GGUFReader", "GGUFReader"]


def test_afterwards_the_library_is_as_it_was(path):
    original = gguf.GGUFReader

    def fail():
        with read_once(path):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert gguf.GGUFReader is original


def test_blocks_of_two_threads_wait_for_each_other(path):
    seen = []

    def second():
        with read_once(path) as reader:
            seen.append(gguf.GGUFReader(path) is reader)

    thread = threading.Thread(target=second)
    with read_once(path) as reader:
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert gguf.GGUFReader(path) is reader
    thread.join(30)
    assert seen == [True]


@pytest.mark.real
def test_a_model_with_its_tokenizer_is_parsed_once(smollm2_gguf, parsed):
    model = fastinterp.load(smollm2_gguf, device="cpu")
    assert parsed == ["Reader"]
    assert model.token_strings(model.encode([" it to Mary"], prepend_bos=False)[0]) == [" it", " to", " Mary"]
