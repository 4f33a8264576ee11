#!/bin/sh
grep -q '^hello, remote (1.0)$' app/transcript.txt
