"""Whether this process does nothing but serve, so that families leave out imports that no request needs.

Said by what starts a service, before a family is imported. Elsewhere libraries stay whole, for whoever imported
patchbay may use them, too.
"""

only_serves = False
