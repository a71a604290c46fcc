"""Stand-in until the native build lands."""
def has_extension() -> bool: return False
def extension_error(): return "not built"
def build_info(): return {}
