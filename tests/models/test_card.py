"""What a source's model card says: licence, base models, task, and that a broken one says nothing."""

from __future__ import annotations

import pytest

from diffkiln.models.card import read_card

HUB = {"model": "someone/tiny", "revision": "ab" * 20}


@pytest.fixture
def stated(tmp_path):
    def read(front, origin=HUB):
        (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
        return read_card(tmp_path, origin)

    return read


def test_licence_base_model_and_task_are_read(stated):
    front = "license: mit\nbase_model: someone/large\npipeline_tag: text-to-image\ndatasets: [x]"
    assert stated(front) == {"license": "mit", "base_model": ["someone/large"], "pipeline_tag": "text-to-image"}


def test_named_licence_keeps_its_name_and_its_link_becomes_absolute(stated):
    front = "license: other\nlicense_name: its-own\nlicense_link: LICENSE.md"
    link = f"https://huggingface.co/someone/tiny/blob/{'ab' * 20}/LICENSE.md"
    assert stated(front) == {"license": "other", "license_name": "its-own", "license_link": link}
    assert "license_link" not in stated(front, {})
    assert stated("license: other\nlicense_link: https://there/it-is", {})["license_link"] == "https://there/it-is"
    assert "license_link" not in stated("license_link: javascript://x", {})


@pytest.mark.parametrize("front", ["license: [", "- a", "license: {a: b}", "license: []"])
def test_card_of_another_shape_states_nothing(stated, front):
    assert stated(front) == {}


def test_no_card_and_a_header_that_has_no_end_state_nothing(tmp_path):
    assert read_card(tmp_path, HUB) == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n" + "x\n" * 2**20)
    assert read_card(tmp_path, HUB) == {}
