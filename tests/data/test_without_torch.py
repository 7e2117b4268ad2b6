import subprocess
import sys

import numpy as np
from PIL import Image

from vlmlora.data.loader import make_batches
from vlmlora.data.processing import VisionLanguageProcessor

# As if torch were not installed: the import system does not find it.
SCRIPT = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
absent = ("torch", "torchvision")
PathFinder.find_spec = lambda name, *a, **k: None if name.split(".")[0] in absent else find(name, *a, **k)
import numpy as np
from vlmlora.data.loader import make_batches
from vlmlora.data.processing import VisionLanguageProcessor
frames = np.load(sys.argv[2])
parts = [{"type": "image", "image": sys.argv[3]}, {"type": "video", "video": frames}]
messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "123"}]
processor = VisionLanguageProcessor.from_pretrained(sys.argv[1])
batch = make_batches([messages], processor, batch_size=1)[0]
processor.save_pretrained(sys.argv[4])
assert not any(name in sys.modules for name in absent)
np.savez(sys.argv[5], **batch)
"""


def test_messages_become_batches_where_torch_is_not_installed(family, config, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 60, 70, 3), np.uint8)
    np.save(tmp_path / "frames.npy", frames)
    Image.fromarray(frames[0]).save(tmp_path / "image.png")
    family.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    names = (".", "frames.npy", "image.png", "saved", "out.npz")
    subprocess.run(
        [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in names)], check=True, timeout=300
    )
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.fromarray(frames[0])},
                {"type": "video", "video": frames},
            ],
        },
        {"role": "assistant", "content": "123"},
    ]
    expected = make_batches([messages], VisionLanguageProcessor(family), batch_size=1)[0]
    actual = np.load(tmp_path / "out.npz")
    assert set(actual) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value)
    assert (tmp_path / "saved" / "processor_config.json").is_file()
