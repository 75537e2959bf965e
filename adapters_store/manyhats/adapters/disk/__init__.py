"""Files that survive: durable writes, locks, digests, links, and objects in a store of them."""
