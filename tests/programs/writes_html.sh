#!/bin/sh
# Takes the caller for a browser.
echo '<!doctype html><html><body><h1>It works!</h1></body></html>'
