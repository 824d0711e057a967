"""The OpenAPI document is what the server does: schemathesis finds nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.conftest import GENERATIONS, running

EXAMPLES = 60


def test_the_document_of_a_bundle_of_videos_has_its_jobs(filming):
    with running(filming) as served:
        document = served.client.get("/openapi.json").json()
    operation = document["paths"]["/v1/videos"]["post"]
    schemas = {kind: content["schema"] for kind, content in operation["requestBody"]["content"].items()}
    assert set(schemas) == {"application/json", "multipart/form-data"}
    for schema in schemas.values():
        assert "fps" in schema["properties"]
        assert "'exclusiveMinimum': 1.0" in str(schema["properties"]["guidance_scale"])
        assert "stream" not in schema["properties"]
    assert set(document["paths"]["/v1/videos/{video_id}"]) == {"get", "delete"}
    assert set(document["paths"]["/v1/videos/{video_id}/content"]["get"]["responses"]) == {"200", "4XX", "5XX"}


def test_the_document_has_the_bundles_sizes_and_no_status_that_is_never_sent(served):
    document = served.client.get("/openapi.json").json()
    operation = document["paths"][GENERATIONS]["post"]
    (schema,) = [content["schema"] for content in operation["requestBody"]["content"].values()]
    assert schema["properties"]["size"]["anyOf"][0]["enum"] == ["auto", "32x32"]
    assert set(operation["responses"]) == {"200", "4XX", "5XX"}
    assert set(document["paths"]) == {GENERATIONS, "/v1/models", "/health", "/ready"}


#: Registers what a field for an image holds, and images that are none: they are refused, as they should be.
HOOKS = """
import io
import schemathesis
from hypothesis import strategies
from PIL import Image

def picture(size):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()

sides = strategies.integers(1, 64)
for kind in ("image/png", "image/jpeg", "image/webp"):
    schemathesis.openapi.media_type(kind, strategies.tuples(sides, sides).map(picture))
"""


@pytest.mark.more
@pytest.mark.slow
@pytest.mark.parametrize("name", ["drawing", "editing", "filming"])
def test_schemathesis_finds_nothing(name, request, tmp_path):
    (tmp_path / "hooks.py").write_text(HOOKS)
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", "--max-examples", str(EXAMPLES)]
    with running(request.getfixturevalue(name), queue=256) as served:
        done = subprocess.run(
            # A video takes long on a machine that is busy, which is no fault of the document.
            [*command, "--seed", "7", "--request-timeout", "120", f"{served.url}/openapi.json"],
            env={"PATH": "/usr/bin:/bin", "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path), "NO_COLOR": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert served.draw(seed=1).status_code in (200, 404)
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:]
