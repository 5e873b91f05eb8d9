"""What people fill into their requests: the slot values of the assistant grammar.

All invented for this project; names of people are common first names and surnames, no brands. A
pattern is expanded to every phrase it stands for: `(a|b|)` is one of, `{part}` any word of `PARTS`;
a slot's value is a phrase of one of its patterns, each as likely as the other. The same words serve
several slots on purpose (names for contacts, artists, playlists and events; songs made of commands;
reminders that quote other requests), so that a request is understood by its order and not by its
keywords.
"""

from __future__ import annotations

PARTS: dict[str, str] = {
    "hour": "one two three four five six seven eight nine ten eleven twelve",
    "few": "two three four five six eight ten twelve",
    "minutes": "five ten fifteen twenty thirty forty fifty",
    "unit": "one two three four five six seven eight nine",
    "tens": "ten twenty thirty forty fifty sixty seventy eighty ninety",
    "ordinal": (
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
        " fifteenth twentieth"
    ),
    "weekday": "monday tuesday wednesday thursday friday saturday sunday",
    "month": (
        "january february march april may june july august september october november december"
    ),
    "first": (
        "anna ben carla david emma felix grace henry iris jack julia kevin laura leo lily lucas"
        " maria mark mia max nina noah nora oliver omar paul peter priya rosa ruby sam sara simon"
        " sofia tom vera victor will yusuf zoe april june summer jasmine dawn hope joy frank bill"
        " rob art rich mason hunter rose daisy amber"
    ),
    "surname": (
        "miller baker cook fisher hill wood young brown green white black stone rivers woods"
        " santos silva rossi novak meyer tanaka kim chen patel haddad okafor lopez"
    ),
    "family": "mom dad grandma grandpa mum auntie",
    "relative": "wife husband brother sister boss neighbor daughter son landlord doctor",
    "adjective": (
        "silver golden blue red wild quiet lonely broken midnight paper electric little lost"
        " burning frozen velvet summer winter hollow distant"
    ),
    "noun": (
        "river moon train garden window mirror ocean fire rain city road heart sky light shadow"
        " storm letter song kitchen morning"
    ),
    "animals": "foxes wolves tigers birds horses owls ravens bees",
    "genre": (
        "jazz rock pop classical country blues soul reggae techno folk metal electronic ambient"
        " dance latin gospel funk opera"
    ),
    "subject": (
        "politics sports technology science business health music movies football basketball"
        " tennis history travel cooking climate space finance"
    ),
    "grocery": (
        "milk eggs bread butter cheese apples bananas tomatoes onions potatoes carrots chicken"
        " fish rice pasta flour sugar salt pepper coffee tea honey lemons garlic spinach"
        " mushrooms yogurt cereal beans soap shampoo batteries candles napkins water juice"
    ),
    "device": (
        "tv fan heater oven dishwasher dryer vacuum radio kettle toaster humidifier"
        " projector sprinkler fireplace microwave television printer stereo"
    ),
    "machine": "coffee washing",
    "area": (
        "kitchen bedroom bathroom garage office hallway basement attic garden porch nursery study"
        " library"
    ),
    "taste": (
        "italian mexican thai indian chinese japanese greek french korean turkish spanish"
        " vietnamese lebanese ethiopian vegan"
    ),
    "color": "red blue green yellow orange purple white",
    "meal": "breakfast lunch dinner brunch coffee drinks",
}

SLOTS: dict[str, tuple[str, ...]] = {
    "time": (
        "{hour} (|fifteen|thirty|forty five) (|a m|p m|o'clock|in the morning|in the evening)",
        "(half|quarter) past {hour}",
        "quarter to {hour}",
        "{hour} (thirty|) at night",
        "(noon|midnight)",
    ),
    "date": (
        "(today|tomorrow|tonight|the day after tomorrow|now)",
        "(tomorrow|this) (morning|afternoon|evening)",
        "(|next|this) {weekday}",
        "{weekday} (morning|evening|night)",
        "(this|next) (week|weekend|month)",
        "{month} {ordinal}",
        "the {ordinal} of {month}",
        "(christmas|new year's eve|my birthday)",
    ),
    "duration": (
        "{minutes} (minutes|seconds)",
        "{few} (minutes|hours|days)",
        "twenty five minutes",
        "(an|one|half an) hour",
        "an hour and a half",
        "(a|one) minute",
        "{few} and a half (hours|minutes)",
    ),
    "repeat": (
        "every (day|morning|evening|night|week|weekday|hour|other day)",
        "every {weekday}",
        "on (weekdays|weekends)",
        "(daily|weekly|each day|each night|twice a day)",
    ),
    "timer_name": (
        "(pasta|egg|pizza|laundry|tea|workout|homework|oven|nap|meditation|rice|cake|bread)",
        "(chicken|potatoes|coffee|cookies|yoga|study|reading|parking|washing machine|lunch)",
    ),
    "todo": (
        "call (my {relative}|{family}|{first}|the bank|the doctor|the school)",
        "(text|email|write to|meet|pay back|pick up) ({first}|my {relative})",
        "buy (some|more|) {grocery}",
        "(turn off|switch off|check|clean|fix) the {device}",
        "(turn on the|turn off the|replace the|switch off the) (lights|porch light|alarm)",
        "(water the plants|feed the cat|walk the dog|pay the rent|take out the trash)",
        "(take my medicine|do the dishes|do my homework|lock the door|charge the car)",
        "(book a table|book a flight|order a cake|cancel the meeting|cancel the order)",
        "(set the alarm|set a timer|play with the kids|play the piano|practice the guitar)",
        "(check the weather|check the traffic|read the news|read my messages|send the invitation)",
        "(add {first} to the list|make a shopping list|plan the party|start the {device})",
        "(stop by the store|go to the gym|return the book|drive to the airport|stretch|breathe)",
    ),
    "event": (
        "(team meeting|meeting|job interview|conference call|budget review|staff meeting)",
        "(dentist appointment|doctor's appointment|haircut|eye exam|vet appointment)",
        "(yoga class|piano lesson|soccer practice|dance class|book club|choir practice|concert)",
        "(birthday party|wedding|picnic|barbecue|movie night|date night|game night|party)",
        "{meal} with {first}",
        "{meal} with my (boss|sister|brother|team)",
        "{first}'s birthday",
        "(flight|road trip|parent teacher night|soccer game|tennis match|call with {first})",
    ),
    "contact": (
        "{first}",
        "{first}",
        "{first} {surname}",
        "({family}|my {relative}|doctor {surname}|the office|the school|home)",
    ),
    "message": (
        "(i am|i'm) (running late|on my way|almost there|at home|at the office|stuck in traffic)",
        "i (love you|miss you|will be late|will call later|forgot the {grocery})",
        "(happy birthday|good morning|good night|congratulations|thank you|see you {weekday})",
        "(call me back|call me when you get home|call {family}|text me the address)",
        "(dinner|lunch|coffee) is ready",
        "(turn off the lights|turn off the {device}|set the table|play something nice)",
        "(buy|bring|pick up) (some|) {grocery}",
        "what time is (dinner|it|the party|the meeting)",
        "(where are you|are you coming|how is the weather|is it raining there|what's the plan)",
        "the (meeting|party|concert|train) is (cancelled|delayed|at {hour})",
        "remind me to call you",
        "(see you|let's meet) (soon|tomorrow|at {hour}|at the station|on {weekday})",
        "i (set the alarm|turned off the {device}|started the {device}|found the keys)",
    ),
    "phone": ("(mobile|cell|home|office|work|cell phone|mobile phone|landline)",),
    "artist": (
        "{first} {surname}",
        "{first} {surname}",
        "the {adjective} {animals}",
        "{adjective} {noun}",
        "the {animals}",
        "{first} and the {animals}",
        "{first}",
    ),
    "song": (
        "{adjective} {noun}",
        "(dancing|waiting|running|singing) in the {noun}",
        "(call me (tomorrow|later|back)|call me)",
        "turn the lights (down|off|on)",
        "turn (it up|back time|the page)",
        "(stop the {noun}|stop the music|set the {noun} on fire|light my way)",
        "(what a day|what time is love|how long is forever|where is the {noun})",
        "(ten|five|two) minutes to midnight",
        "good (morning|night) {first}",
        "({weekday} morning|{weekday} night)",
        "(play it again|remind me of you|wake me up|add it up|read the news)",
        "{first}",
    ),
    "genre": ("{genre}", "({genre} rock|hip hop|drum and bass)"),
    "playlist": (
        "(morning|workout|party|dinner|road trip|study|sleep|summer|winter|focus|rainy day) mix",
        "(morning coffee|kitchen dance|long drive|deep focus|slow {weekday}|{weekday} {meal})",
        "{genre} (classics|favorites|mix)",
        "(my favorites|{first}'s favorites|{first}'s wedding)",
        "(running|cooking|cleaning|gaming|gym)",
    ),
    "podcast": (
        "the {subject} (hour|report|show)",
        "{subject} (weekly|today|talk)",
        "(stories of the {noun}|letters from the {noun}|the {adjective} {noun})",
        "(the daily news|the morning report|ten minutes of {subject}|good morning {subject})",
    ),
    "amount": (
        "(a bit|a little|a lot|a little bit|one notch|all the way)",
        "(two|three|five) (notches|steps|points)",
        "by {tens} percent",
        "to ({unit}|{tens}|maximum|half)",
    ),
    "room": (
        "{area}",
        "{area}",
        "(living|dining|guest|laundry|kids) room",
        "({first}'s room|{first}'s bedroom|upstairs|downstairs|terrace|front door|entrance)",
    ),
    "color": (
        "(red|blue|green|yellow|orange|purple|pink|white|warm white|cool white|turquoise|amber)",
        "(light|dark) (blue|green|red)",
    ),
    "level": (
        "({tens}|one hundred|{tens} five|five) percent",
        "(half|full brightness|the maximum|the minimum|maximum)",
    ),
    "temperature": (
        "(fifteen|sixteen|seventeen|eighteen|nineteen|twenty) (degrees|)",
        "twenty (one|two|three|four|five) (degrees|)",
        "(sixty|seventy) (|{unit}) degrees",
    ),
    "appliance": (
        "{device}",
        "{device}",
        "({machine} machine|air conditioner|coffee maker|robot vacuum|electric blanket|speaker)",
    ),
    "city": (
        "(london|paris|berlin|madrid|rome|vienna|prague|lisbon|dublin|oslo|helsinki|athens)",
        "(boston|chicago|seattle|denver|austin|dallas|houston|miami|atlanta|phoenix|detroit)",
        "(tokyo|kyoto|seoul|mumbai|delhi|sydney|melbourne|toronto|montreal|cairo|nairobi|lagos)",
        "(new york|los angeles|san francisco|hong kong|mexico city|cape town|buenos aires)",
        "(geneva|florence|georgia|lima|santiago|victoria|jackson|charlotte|madison|salem)",
    ),
    "condition": (
        "(rain|snow|hail|storm|thunder|freeze)",
        "(sunny|windy|cloudy|hot|cold|foggy|humid|warm|dry|icy|rainy|stormy|freezing)",
    ),
    "topic": (
        "{subject}",
        "{subject}",
        "(the election|the economy|the stock market|the climate|the storm|the traffic strike)",
        "({first} {surname}|the {animals}|the (city|local) election|electric cars)",
    ),
    "item": (
        "{grocery}",
        "{grocery}",
        "(olive oil|orange juice|toilet paper|green tea|dog food|light bulbs|ice cream)",
        "({few} {grocery}|a {device}|{color} paint|a birthday card|a book|a phone charger)",
    ),
    "list": (
        "(shopping|grocery|to do|packing|christmas|birthday|wish|gift|party|hardware|reading)",
        "(weekend|{weekday}|camping|kitchen|work|{first}'s|holiday|pharmacy)",
    ),
    "place": (
        "(the|) (airport|train station|office|gym|hospital|supermarket|library|museum|bank)",
        "(home|work|school|{family}'s house|{first}'s (house|place)|the nearest gas station)",
        "(main street|oak avenue|market square|park road|king street|the old bridge|the beach)",
        "the ({taste} restaurant|coffee shop|shopping mall|movie theater|football stadium|zoo)",
    ),
    "cuisine": ("{taste}", "(pizza|sushi|burger|seafood|barbecue|noodle|breakfast)"),
    "party_size": ("({few}|seven|nine) (people|)", "(two adults|a family of four|one)"),
}
