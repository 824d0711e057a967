"""Serve a bundle by two replicas of Ray Serve on this machine, draw ten digits, and stop.

python examples/serving/demo.py [CONFIGURATION]
"""

import base64
import json
import os
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
import yaml
from ray import serve

from diffkiln.serving.ray import Options, build

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def main() -> None:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("serve.yaml")
    configuration = yaml.safe_load(file.read_text())
    (application,) = configuration["applications"]
    options = Options.model_validate(application["args"])
    options = options.model_copy(update={"bundles": {k: str(Path(v).absolute()) for k, v in options.bundles.items()}})
    address = configuration["http_options"]

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or else Ray tells its makers of its use
    ray.init("local", include_dashboard=False, num_cpus=4, log_to_driver=False)
    try:
        serve.start(http_options=address)
        serve.run(build(options), name=application["name"], route_prefix=application["route_prefix"])
        url = f"http://{address['host']}:{address['port']}/v1/images/generations"

        def draw(word: str) -> bytes:
            body = json.dumps({"prompt": f"a handwritten {word}", "seed": 7}).encode()
            request = urllib.request.Request(url, body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                return base64.b64decode(json.load(answer)["data"][0]["b64_json"])

        folder = Path("build/served-digits")
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(len(WORDS)) as pool:
            for word, image in zip(WORDS, pool.map(draw, WORDS), strict=True):
                (folder / f"{word}.png").write_bytes(image)
        print(f"{len(WORDS)} digits by {options.replicas} replicas: look into {folder}")
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
