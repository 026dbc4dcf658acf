"""Sentences of several lengths on which an exported file is compared with its model."""

SENTENCES = (
    "Yes.",
    "What a waste of two hours!",
    "The soup was cold, the waiter was not.",
    "Returns the largest value along the given axis.",
    "a quietly moving film about people who have run out of things to say",
    "Nobody in the village could remember when the old mill had last turned, and nobody cared to ask.",
    "Shares fell 3.4% on Tuesday after the company cut its forecast for the second time this year.",
    "Is there a train from Zürich to Milan that leaves before 07:30 on public holidays?",
    "I have owned three of these. The first two broke within a week; the third one, to my surprise, still works.",
    "Compute the singular value decomposition of a dense matrix and return only the factors that were asked for.",
    "No.",
    "Great acting, terrible script, and a soundtrack that belongs in a different and much better picture altogether.",
    "The committee will publish its findings in March. Until then, members were asked not to speak to the press.",
    "Although the treatment lowered blood pressure in most patients, the difference between the two groups was smaller than "
    "the trial had been designed to detect, and the authors ask for a larger study before anyone changes their practice.",
    "She laughed, closed the book and said that it would do.",
    "If the file does not exist, an error is raised that names the path; with `missing_ok` set, nothing happens and the call "
    "returns as if the file had been removed.",
    "Best pizza in town. Cash only!",
    "It rained.",
    "The second half is slower, and better for it: the camera waits, the actors breathe, and what looked like an ordinary "
    "thriller turns into a patient study of two sisters who can neither forgive each other nor stay away.",
    "Water boils at a lower temperature in the mountains because the air presses less on its surface.",
    "Do not buy this phone.",
    "He said he would come, then he said he could not, and in the end he came.",
    "Sorts the rows in place and returns None, so chaining another call onto it is a mistake that many make once.",
    "An hour later the street was empty again.",
)
