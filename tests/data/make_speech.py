"""Makes speech.ogg, three sentences of synthesized speech; needs Debian's espeak-ng.

python tests/data/make_speech.py
"""

import io
import subprocess
from pathlib import Path

import numpy as np
import soundfile
import soxr

SENTENCES = (
    "My name is Alice, and I live in London with my two cats.",
    "We went to the market and bought apples, bread, and cheese.",
    "Please call me tomorrow morning at seven o'clock.",
)
RATE = 16_000


def spoken(sentence: str) -> np.ndarray:
    command = ["espeak-ng", "-v", "en-us", "-s", "140", "--stdout", sentence]
    samples, rate = soundfile.read(io.BytesIO(subprocess.run(command, check=True, capture_output=True).stdout))
    return np.concatenate([soxr.resample(samples, rate, RATE), np.zeros(RATE // 2)])


if __name__ == "__main__":
    joined = np.concatenate([spoken(sentence) for sentence in SENTENCES])
    soundfile.write(Path(__file__).with_name("speech.ogg"), joined, RATE, format="OGG", subtype="OPUS")
