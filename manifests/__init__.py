"""Data sheets of known data sets, one TOML file each."""
