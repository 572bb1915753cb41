"""The store on disk: shards, volumes, tables, commit and reader. The home of h5py and of Parquet."""
