"""The dashboard: pages under /ui, made on the server, which need no script and load nothing from elsewhere (docs/dashboard.md).

`frame` makes a page of a template, and all that stands around it; `visit` is one call of a signed-in browser; `views` reads what a page
shows; `words` says it; `routes` has the pages themselves.
"""
