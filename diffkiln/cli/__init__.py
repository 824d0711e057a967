"""The command line: arguments and printing. What it does is done elsewhere.

Exit codes: 0 ok · 2 bad spec, usage or source · 3 illegal plan · 4 build failed · 5 incompatible machine ·
6 integrity or trust refused · 7 a call that the bundle cannot serve · 70 internal fault · 130 interrupted.
Results go to the standard output, everything else to standard error.
"""

from __future__ import annotations

import io
import os
import sys

import click

from diffkiln.cli.build import check_, compile_, init_
from diffkiln.cli.clean import clean_
from diffkiln.cli.group import Sections
from diffkiln.cli.hub import pull_, push_
from diffkiln.cli.look import inspect_, passes_, schema_, targets_
from diffkiln.cli.lora import lora
from diffkiln.cli.measure import bench_, evaluate_, tune_
from diffkiln.cli.memory import memory_
from diffkiln.cli.printing import say
from diffkiln.cli.run import run_
from diffkiln.cli.serve import serve_
from diffkiln.cli.targets import add_target_, retune_, strip_
from diffkiln.cli.trust import sign, verify
from diffkiln.errors import DiffkilnError
from diffkiln.guards.gate import ours


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="diffkiln", prog_name="diffkiln")
def cli() -> None:
    """Compile Hugging Face diffusers pipelines into bundles that run on torch alone.

    \b
    diffkiln init MODEL -o spec.json         write a first spec
    diffkiln check spec.json                 find every problem before building
    diffkiln compile spec.json -o bundle     build
    diffkiln run bundle --prompt "a cat" -o cat.png
    """


for command in (init_, check_, compile_, add_target_, strip_, retune_, passes_, targets_, schema_):
    cli.add_command(command)
for command in (run_, serve_, inspect_, memory_, lora, bench_, evaluate_, tune_, push_, pull_, verify, sign, clean_):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit code. Setting DIFFKILN_DEBUG lets exceptions through with their traceback.
    """
    try:
        result = cli.main(args=arguments, prog_name="diffkiln", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        usage = io.StringIO()
        error.show(file=usage)
        say(usage.getvalue().rstrip())
        return 2
    except (KeyboardInterrupt, click.Abort):
        say("interrupted; the output is as it was before")
        return 130
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except DiffkilnError as error:
        if os.environ.get("DIFFKILN_DEBUG"):
            raise
        say(f"error: {error}")
        return error.exit_code
    except BaseException as error:  # of native extensions, too, which are no Exception
        if os.environ.get("DIFFKILN_DEBUG"):
            raise
        known = ours(error, "diffkiln")
        say(f"error: {known}")
        return known.exit_code


__all__ = ["cli", "main"]
