from pathlib import Path
DOCUMENT = Path(__file__).parents[2] / "docs" / "coverage.md"
def document(): return ""
