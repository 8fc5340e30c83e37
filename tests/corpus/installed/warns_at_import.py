import warnings

warnings.warn("of an import")
