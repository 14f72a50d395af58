"""`sosvae edit`: a page in a browser, live under the brush, with a small server or as one file.

runs.py        finds runs, decodes and encodes
parameters.py  what one code sends to the page: typed arrays behind a JSON header
conditionals.py  what a page cannot work out
uploads.py     a stranger's file as an image, within limits
guard.py       token, Host and Origin
document.py    the page as one HTML document
server.py      the routes
export.py      one self-contained page
page/          the page's TypeScript sources; static/ is what esbuild makes of them
"""
