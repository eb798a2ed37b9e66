"""The operations that carry every method, one file each: custom op, fake, autograd, dispatch to a backend.

An operation takes row weights and returns weighted sums over its rows, so that the numbers its backward needs are
known when the forward ends. Means, group scaling and term weights belong to the callers. The operations of RKD, SP and
PKT have no weights, and take the rows of all ranks: a rank computes its share.
"""
