"""The engines that run a rank: one module each, behind the interface of ``base``."""
