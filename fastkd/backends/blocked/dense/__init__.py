"""The similarity operations at sizes whose whole matrix fits the cache: no tiles, and the exponentials are kept.

Below about a thousand rows the calls of torch cost as much as the arithmetic. So each step here is one call for both
sides, and what the forward computed is handed to the backward (``kept``) instead of computed again.
"""
