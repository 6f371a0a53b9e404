"""Floor 3: adapter files: written, read, verified, loaded, merged, looked at. One file per dialect in dialects/.

Nothing here names a model family: names of layers, prefixes and metadata come from the family that is handed in.
"""

from lorakit.export.adapter import export_adapter
from lorakit.export.dialects import DIALECTS
from lorakit.export.files import read_adapter, write_adapter
from lorakit.export.load import LoadedAdapter, load_adapter
from lorakit.export.merge import MergeReport, merge_adapter
from lorakit.export.single import merge_single_file
from lorakit.export.survey import inspect_adapter
from lorakit.export.verify import ExportReport, write_verified

__all__ = [
    "DIALECTS",
    "ExportReport",
    "LoadedAdapter",
    "MergeReport",
    "export_adapter",
    "inspect_adapter",
    "load_adapter",
    "merge_adapter",
    "merge_single_file",
    "read_adapter",
    "write_adapter",
    "write_verified",
]
