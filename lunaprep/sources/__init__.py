"""Data sets: where their scans and annotation tables lie. One module each."""
