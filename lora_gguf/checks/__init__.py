"""What ``verify`` and ``doctor`` find: what each tensor should hold and holds instead, what to say of an adapter and
its base.
"""
