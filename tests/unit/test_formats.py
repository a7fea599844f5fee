"""What users bring as MODEL: told apart by content, refused in one line with what to do."""

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgekit.errors import EdgeKitError, ModelError, UsageError
from edgekit.formats import detect

HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(100)
TFLITE = b"\x1c\0\0\0TFL3" + bytes(100)
PICKLE = pickle.dumps({"a": 1})
# torch.save's magic number, as pickle protocol 2 writes it
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
KERAS = ("metadata.json", "config.json", "model.weights.h5")
PT2 = ("m/models/model.json", "m/archive_format", "m/data/weights/weight_0")
OLD_PT2 = ("serialized_exported_program.json", "serialized_state_dict.pt", "version")
SCRIPT = ("m/data.pkl", "m/code/__torch__.py", "m/constants.pkl", "m/version")
STATE_DICT = ("m/data.pkl", "m/data/0", "m/version")


def put(path: Path, content: bytes | tuple[str, ...]) -> Path:
    """A file of these bytes, or a zip of files of these names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
        return path
    with zipfile.ZipFile(path, "w") as archive:
        for name in content:
            archive.writestr(name, "x")
    return path


@pytest.mark.parametrize(
    ("name", "content", "fmt"),
    [
        ("m.onnx", b"\x08\x08", "onnx"),
        ("M.ONNX", b"\x08\x08", "onnx"),
        ("m.tflite", TFLITE, "tflite"),
        ("m.keras", KERAS, "keras"),
        ("m.h5", HDF5, "keras"),
        ("m.hdf5", bytes(512) + HDF5, "keras"),  # behind a user block
        ("m.keras", HDF5, "keras"),  # tf.keras wrote such
        ("m.h5", KERAS, "keras"),
        ("m.pt2", PT2, "torch-export"),
        ("m.pt2", OLD_PT2, "torch-export"),
        ("m.pt", PT2, "torch-export"),
        ("m.pt", SCRIPT, "torchscript"),
        ("m.jit", SCRIPT, "torchscript"),
        ("m.pth", SCRIPT, "torchscript"),
        ("m.pt2", SCRIPT, "torchscript"),
        ("m.joblib", PICKLE, "sklearn"),
        ("m.joblib", b"x\x9c", "sklearn"),  # joblib.dump(compress=3)
        ("m.pkl", PICKLE, "sklearn"),
        ("m.skops", ("schema.json",), "sklearn"),
        ("m.joblib", ("schema.json",), "sklearn"),
    ],
)
def test_content_decides_where_the_suffix_lies(name, content, fmt, tmp_path) -> None:
    path = put(tmp_path / name, content)
    found = detect(str(path))
    assert (found.format, found.files, found.source) == (fmt, (path,), [str(path)])


def test_companions_belong_to_it(tmp_path) -> None:
    xml = put(tmp_path / "m.xml", b"<net/>")
    with pytest.raises(ModelError, match=r"no file .*m\.bin; the weights of m\.xml"):
        detect(str(xml))
    weights = put(tmp_path / "m.bin", b"")  # a model without weights
    assert detect(str(xml)).files == (xml, weights)
    param = put(tmp_path / "m.param", b"7767517\n")
    assert detect(str(param)).files == (param, weights)
    sidecar = put(tmp_path / "m.json", b"{}")
    assert detect(str(param)).files == (param, weights, sidecar)
    assert detect(str(param)).source == [str(param), str(weights), str(sidecar)]


@pytest.mark.parametrize("main", ["saved_model.pb", "saved_model.pbtxt"])
def test_a_saved_model_is_a_folder_with_all_its_files(main, tmp_path) -> None:
    folder = tmp_path / "model.keras"  # what tf.keras called some
    files = [
        put(folder / name, b"x")
        for name in (
            main,
            "assets/vocabulary.txt",
            "keras_metadata.pb",
            "variables/variables.index",
        )
    ]
    found = detect(str(folder))
    assert (found.format, found.files, found.folder) == ("savedmodel", tuple(files), folder)
    assert found.source == [str(folder)]


def test_an_ml_package_is_a_folder_with_its_specification_first(tmp_path) -> None:
    folder = tmp_path / "m.mlpackage"
    inside = ("Data/com.apple.CoreML/model.mlmodel", "Data/weights/weight.bin", "Manifest.json")
    files = [put(folder / name, b"x") for name in inside]
    found = detect(str(folder))
    assert (found.format, found.files, found.folder) == ("coreml", tuple(files), folder)
    files[0].unlink()
    with pytest.raises(ModelError, match="without an .mlmodel in it"):
        detect(str(folder))
    files[2].unlink()
    with pytest.raises(ModelError, match=r"without its Manifest\.json"):
        detect(str(folder))


@pytest.mark.parametrize("name", ["m.py", "a:b/m.py", r"C:\models\m.py", "x.py:y/m.py"])
def test_factories_and_paths_with_colons(name, tmp_path) -> None:
    path = put(tmp_path / name, b"def build(): ...")
    found = detect(f"{path}:build")
    assert (found.format, found.files, found.function) == ("torch", (path,), "build")
    assert found.source == [f"{path}:build"]
    model = put(tmp_path / "d:e" / "m:1.onnx", b"\x08\x08")
    assert detect(str(model)).files == (model,)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.onnx", b"", "is empty"),
        ("m.onnx", TFLITE, "TFLite model by its content; rename it to m.tflite"),
        ("m.tflite", b"\x08\x08\x12\0", "not a TFLite model"),
        ("m.h5", b"\x08\x08", "not a Keras 3 archive or an HDF5 file"),
        ("m.keras", b"PK\x03\x04 cut", "cut short or damaged"),
        ("m.keras", ("config.json",), "unpack it"),
        ("m.keras", b"<!DOCTYPE html><p>404", "a web page"),
        ("m.onnx", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("m.pt2", b"\x08", "not an archive of torch.export"),
        ("m.pt2", ("m/data/aotinductor/model/x.so",), "compiled for one machine"),
        ("m.pt", b"\x0a\0\0\0\0\0\0\0{\"a\"", "weights without a model"),
        ("m.npz", ("a.npy",), "arrays, not a model"),
        ("m.pt", ("a.npy",), "arrays, not a model"),
        ("m.edgekit", ("manifest.json",), "a bundle"),
        ("m.keras", ("manifest.json",), "a bundle|an EdgeKit bundle"),
        ("m.foo", b"x", r"read are \.onnx.*SavedModel folder.*module\.py:factory.*\.joblib"),
        ("m", b"x", "read are"),
        ("m.foo", KERAS, r"rename it to m\.keras"),
        ("m.foo", SCRIPT, r"rename it to m\.pt"),
        ("m.caffemodel", b"x", "a later version"),
        ("m.prototxt", b"x", "a later version"),
        ("m.mlmodel", b"x", "Core ML"),
        ("m.engine", b"x", "TensorRT"),
        ("m.gguf", b"GGUF", "GGUF"),
        ("m.safetensors", b"x", "module.py:factory --weights"),
        ("m.ckpt", b"x", "checkpoint"),
        ("m.ckpt.index", b"x", "checkpoint"),
        ("m.pb", b"x", "frozen TensorFlow graph"),
        ("saved_model.pb", b"x", "give its folder"),
        ("m.bin", b"x", "give the .xml"),
        ("m.zip", b"x", "unpack it"),
        ("m.py", b"x", "m.py:factory"),
    ],
)  # fmt: skip
def test_what_is_not_read_says_what_to_do(name, content, said, tmp_path) -> None:
    path = put(tmp_path / name, content)
    with pytest.raises(UsageError, match=said) as caught:
        detect(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "it is empty"),
        (["1/saved_model.pb"], "/1 is one: give that"),
        (["config.json", "model.weights.h5"], r"zip its files to a \.keras"),
        (["checkpoint", "m.index"], "TensorFlow checkpoint"),
        (["readme.md", "m.onnx"], r"give the model in it: .*m\.onnx"),
        (["model.safetensors"], "--weights"),
        (["readme.md"], "read are"),
    ],
)
def test_folders_that_are_no_saved_model(files, said, tmp_path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        put(folder / name, b"x")
    with pytest.raises(ModelError, match=said) as caught:
        detect(str(folder))
    assert "without saved_model.pb" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "no model given"),
        ("absent.onnx", "no file absent.onnx"),
        ("absent.py:build", "no file absent.py"),
        ("absent.py:", "not the name of a function"),
        ("absent.py:a:b", "'a:b' is not the name"),
        ("a\0b.onnx", "cannot read"),
        ("x" * 5000, "cannot read"),
        (r"C:\models\m.onnx", "no file"),
    ],
)
def test_what_is_not_there(spec, said) -> None:
    with pytest.raises(UsageError, match=said):
        detect(spec)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system")
def test_a_pipe_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="a pipe"):
        detect(str(tmp_path / "m.onnx"))


class _Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.pt2", "m.pkl", "m.joblib", "m.onnx"])
@pytest.mark.parametrize("wrap", ["bare", "zip", "old"])
def test_nothing_is_unpickled(name, wrap, tmp_path) -> None:
    canary = tmp_path / "canary"
    bomb = pickle.dumps(_Bomb(canary))
    path = put(tmp_path / name, OLD_TORCH + bomb if wrap == "old" else bomb)
    if wrap == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/data.pkl", bomb)
            archive.writestr("m/version", "3")
    try:
        found = detect(str(path))
    except EdgeKitError as error:
        assert "\n" not in str(error)
    else:
        assert found.format == "sklearn"
    assert not canary.exists()


def test_it_loads_no_framework() -> None:
    code = (
        "import sys, edgekit.formats\n"
        "print([m for m in sys.modules if m in ('torch', 'sklearn', 'psutil', 'h5py', 'joblib')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
