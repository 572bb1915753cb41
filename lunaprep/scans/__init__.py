"""One scan: its header checked, its voxels read. The home of SimpleITK."""
