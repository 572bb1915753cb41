"""The whole detector: read a scan, segment its lungs, group what is marked, classify each group, report."""
