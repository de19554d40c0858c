"""Coverage: every architecture of several model libraries, tiny and random, cut by a quarter of its channels."""
