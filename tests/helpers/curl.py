"""What the docs use of curl, for machines that have none: `python curl.py [-X METHOD] [-H HEADER] [-d DATA] URL`.

As `curl --silent --show-error --fail-with-body`: the body goes to stdout, and an error status makes exit status 22.
"""

import argparse
import sys

import httpx2


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("-X", dest="method")
    parser.add_argument("-H", dest="headers", action="append", default=[])
    parser.add_argument("-d", dest="data")
    given = parser.parse_args()
    headers = dict(header.split(": ", 1) for header in given.headers)
    method = given.method or ("GET" if given.data is None else "POST")
    answer = httpx2.request(method, given.url, headers=headers, content=given.data, timeout=60)
    sys.stdout.write(answer.text)
    return 22 if answer.is_error else 0


if __name__ == "__main__":
    sys.exit(main())
