"""YAML files for ``aimc-pl fit``, found by name."""
