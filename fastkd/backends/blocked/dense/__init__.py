"""The similarity operations at sizes whose whole matrix fits the cache: no tiles, and the gradients come at once.

Below about a thousand rows the calls of torch cost as much as the arithmetic. So the forward computes the gradients
too, as long as it has the exponentials, for an upstream gradient of one. The backward multiplies them by the real one.
"""
