"""The on-disk format: what a bundle claims (manifest), how it is written, and how it is read and checked."""

from diffkiln.bundle.digest import Progress, sha256_bytes, sha256_file
from diffkiln.bundle.manifest import (
    FORMAT_MAJOR,
    FORMAT_MINOR,
    FORMAT_NAME,
    KNOWN_FEATURES,
    MANIFEST,
    MANIFEST_DIGEST,
    PARTIAL,
    UNHASHED,
    EngineRow,
    FileRow,
    Format,
    GroupRow,
    Manifest,
    PassRow,
    Pipeline,
    Requires,
    Role,
    TensorSpec,
    Variant,
    bundle_id,
    dump_manifest,
    parse_manifest,
)
from diffkiln.bundle.partial import dump_partial, engine_targets, left_out
from diffkiln.bundle.paths import check_path, check_unique
from diffkiln.bundle.reader import Bundle, open_bundle
from diffkiln.bundle.state import state_dir
from diffkiln.bundle.trust import NativePermit, authorise_native, has_receipt, write_receipt
from diffkiln.bundle.verified import Verified
from diffkiln.bundle.writer import BundleWriter

__all__ = [
    "FORMAT_MAJOR",
    "FORMAT_MINOR",
    "FORMAT_NAME",
    "KNOWN_FEATURES",
    "MANIFEST",
    "MANIFEST_DIGEST",
    "PARTIAL",
    "UNHASHED",
    "Bundle",
    "BundleWriter",
    "EngineRow",
    "FileRow",
    "Format",
    "GroupRow",
    "Manifest",
    "NativePermit",
    "PassRow",
    "Pipeline",
    "Progress",
    "Requires",
    "Role",
    "TensorSpec",
    "Variant",
    "Verified",
    "authorise_native",
    "bundle_id",
    "check_path",
    "check_unique",
    "dump_manifest",
    "dump_partial",
    "engine_targets",
    "has_receipt",
    "left_out",
    "open_bundle",
    "parse_manifest",
    "sha256_bytes",
    "sha256_file",
    "state_dir",
    "write_receipt",
]
