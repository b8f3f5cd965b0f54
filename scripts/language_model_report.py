def summarise(out, description):
    pass
