"""The errors a user can meet. Each message is one line: what, where, got, expected, what to do."""


class LunaprepError(Exception):
    """Base of all errors that are the input's or the machine's, not a bug; ``exit_code`` is the command's."""

    exit_code = 1


class UsageError(LunaprepError, ValueError):
    """The command or call was given something that cannot work as it stands."""

    exit_code = 2


class ScanError(LunaprepError, ValueError):
    """One scan cannot be used. It is reported, recorded in scans.parquet and skipped."""


class PassingScanError(ScanError):
    """The system would not give one scan (I/O, rights, descriptors, memory): another try may help."""


class TableError(LunaprepError, ValueError):
    """A CSV file as a whole cannot be used (a bad row is only reported, not raised)."""


class StoreError(LunaprepError, ValueError):
    """A store, or one file of it, is not what its records say."""


class FormatError(StoreError):
    """A store of a format that this version does not know: whole, perhaps, and another version's."""


class DiskError(LunaprepError, OSError):
    """The disk of the store failed to read or write; no scan is to blame."""


class NoSpaceError(DiskError):
    """The disk is full, or would be."""

    exit_code = 5


class BusyError(LunaprepError, RuntimeError):
    """Another build holds the lock of this store."""

    exit_code = 75
