def write_configuration(out, found): pass
