"""`mokus bench editing`: what each editor does to what was edited and to what was not, in text and in images.

`cases` is what is edited and asked, `measure` the figures, `run` every editor after one edit and after many, each on top
of the earlier ones, `report` and `page` the page with its `charts`.
"""
