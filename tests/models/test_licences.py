from __future__ import annotations

import pytest
import safetensors.torch
import torch

from diffkiln.models.licences import licence_in, licence_of


@pytest.mark.parametrize(
    ("card", "stated"),
    [
        ("---\nlicense: apache-2.0\n---\n# Model", {"license": "apache-2.0"}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: flux-dev\nlicense_link: LICENSE.md\ntags: [a]\n---\n",
            {"license": "other", "license_name": "flux-dev", "license_link": "LICENSE.md"},
        ),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {"license": "mit, apache-2.0"}),
        ("---\nlicense:\n- 'mit'\n  - \"other\"\ntags:\n- a\n---\n", {"license": "mit, other"}),
        ('---\nlicense: "mit"\n---\n', {"license": "mit"}),
        ("---\nlicense: {a: b}\nlicense_name:\n---\n", {}),
        ("---\nlicense: !!python/object:os.system x\n---\n", {}),
        ("---\nlicense: " + "[" * 500_000 + "\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("# license: mit", {}),
        ("", {}),
    ],
)
def test_what_a_card_states_is_copied(tmp_path, card, stated):
    (tmp_path / "README.md").write_text(card, encoding="utf-8", newline="")
    assert licence_of(tmp_path) == stated


def test_no_card_states_nothing(tmp_path):
    assert licence_of(tmp_path) == {}
    (tmp_path / "README.md").mkdir()
    assert licence_of(tmp_path) == {}


def test_an_adapters_own_metadata_count(tmp_path):
    file = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, file, {"modelspec.license": "CC-BY-4.0"})
    assert licence_in(file) == {"license": "CC-BY-4.0"}
    for metadata in ({"other": "x"}, None):
        safetensors.torch.save_file({"a": torch.zeros(1)}, file, metadata)
        assert licence_in(file) == {}
    for data in (b"", b"\xff" * 8, b"\2\0\0\0\0\0\0\0[]", b"\4\0\0\0\0\0\0\0nonsense"):
        file.write_bytes(data)
        assert licence_in(file) == {}
