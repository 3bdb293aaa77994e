"""Where tensors live: memory that can be paged out, and the shards of tensors that several processes share."""

from lion._memory import paging, sharding

__all__ = ["paging", "sharding"]
