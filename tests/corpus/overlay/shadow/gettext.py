print("gettext runs")


def gettext(text):
    return text.upper()


ngettext = gettext
