"""Where tensors live: their addresses, memory that can be paged out, shards that several processes share."""

from lion._memory import addresses, looks, paging, sharding

__all__ = ["addresses", "looks", "paging", "sharding"]
