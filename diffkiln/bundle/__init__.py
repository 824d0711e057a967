"""The on-disk format: what a bundle claims (manifest), how it is written, and how it is read and checked."""

from diffkiln.bundle.devices import device_features, device_of, device_policy, devices_of
from diffkiln.bundle.digest import Progress, sha256_bytes, sha256_file
from diffkiln.bundle.layout import MANIFEST, MANIFEST_DIGEST, PARTIAL, SIGNATURE, UNHASHED
from diffkiln.bundle.manifest import (
    FORMAT_MAJOR,
    FORMAT_MINOR,
    FORMAT_NAME,
    KNOWN_FEATURES,
    AppliedPass,
    EngineEntry,
    FileEntry,
    Format,
    GroupEntry,
    Manifest,
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
from diffkiln.bundle.policy import Pin, Policy, find_policy, read_policy
from diffkiln.bundle.reader import Bundle, open_bundle
from diffkiln.bundle.readers import Job, Readers
from diffkiln.bundle.sign import sign_bundle
from diffkiln.bundle.signature import Signature
from diffkiln.bundle.signers import claimed, sign_with_certificate, sign_with_key, sign_with_sigstore, signer_of
from diffkiln.bundle.state import state_dir
from diffkiln.bundle.tried import Tried
from diffkiln.bundle.trust import NativePermit, authorise_native, has_receipt, require_signer, write_receipt
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
    "SIGNATURE",
    "UNHASHED",
    "AppliedPass",
    "Bundle",
    "BundleWriter",
    "EngineEntry",
    "FileEntry",
    "Format",
    "GroupEntry",
    "Job",
    "Manifest",
    "NativePermit",
    "Pin",
    "Pipeline",
    "Policy",
    "Progress",
    "Readers",
    "Requires",
    "Role",
    "Signature",
    "TensorSpec",
    "Tried",
    "Variant",
    "Verified",
    "authorise_native",
    "bundle_id",
    "check_path",
    "check_unique",
    "claimed",
    "device_features",
    "device_of",
    "device_policy",
    "devices_of",
    "dump_manifest",
    "dump_partial",
    "engine_targets",
    "find_policy",
    "has_receipt",
    "left_out",
    "open_bundle",
    "parse_manifest",
    "read_policy",
    "require_signer",
    "sha256_bytes",
    "sha256_file",
    "sign_bundle",
    "sign_with_certificate",
    "sign_with_key",
    "sign_with_sigstore",
    "signer_of",
    "state_dir",
    "write_receipt",
]
