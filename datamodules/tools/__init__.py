"""Looking at folders of shards: what is there, what is wrong with it, its figures and its pictures."""
