"""Common English words for the pictures of printed text."""

__all__ = ["WORDS"]

_TEXT = """
about above across action after again air almost along also always animal answer apple area around arrow
autumn away baby back ball bank base basket beach bean bear beautiful before begin behind bell below
bench best better between big bird black blanket blue board boat body bone book border both bottle
bottom box branch brave bread break bridge bright bring brother brown brush bucket build burn bus butter
button cake calm camera candle captain car care carry castle cat catch center chair change cheese cherry
child circle city class clean clear clock close cloud coast coat coffee cold color common cook copper
corner cotton country cover cream cross crowd current curve dance danger dark date daughter day deep
deer desert desk detail dinner direct dish distance doctor dog door double down draw dream dress drink
drive drop dry duck dust each ear early earth east eat edge egg eight electric empty end energy engine
enter equal evening event ever every exit expert eye face factory fair fall family famous farm fast
father feather feel fence few field figure final find finger fire fish flag flame flat float floor flour
flower fly fold follow food foot forest fork form forward fox frame free fresh friend front fruit full
game garden gate gather gentle giant gift girl give glad glass glove goat gold good grain grand grape
grass gray great green ground group grow guard guest guide half hammer hand happy harbor hard hat head
health hear heart heat heavy height help hidden high hill history hold hole home honey hope horse hotel
hour house huge human hundred hunt ice idea inch inside iron island jacket jar join journey judge juice
jump just keep key kind king kitchen knee knife known ladder lake lamp land language large last late
laugh lawyer leaf learn leather left lemon length letter level light line lion list listen little local
long loud lunch machine magnet main make many map march market mask master match matter meadow meal
measure meat medal melon member metal middle mile milk minute mirror moment money monkey month moon
morning mother motor mountain mouse mouth move museum music nail name narrow nature near neck needle
neighbor nest never new night nine noise north nose note number ocean office old onion open orange order
other outside oven over owner page paint pair palace paper parent park part party past path pattern
peace pearl pencil people pepper person phone photo piano picture piece pilot pine pink place plain
planet plant plate play please pocket poem point polar pond port potato pound power present pretty price
print prize proud pull purple push quarter queen quick quiet rabbit radio rail rain rapid reach read
ready real reason record red region remain remember rent repair report rest result return rice rich ride
right ring river road robot rock roof room rope rose rough round route royal rubber rule running safe
sail salad salt sample sand saturn scale scene school science season second secret see seed sentence
seven shadow shape sharp sheep sheet shelf ship shirt shore short shoulder show side signal silent
silver simple single sister skin sleep slow small smart smile smoke snow soap soft soil soldier son song
sound soup south space spare speak special speed spoon spring square stable stamp stand star start state
station steam steel step stone store storm story straight strange stream street string strong student
sudden sugar summer sun surface sweet swim table tail tall taste taxi teacher team ten tent test thank
theater thick thin thing think thread three throat thumb thunder ticket tiger time tired title today
together tomato tongue tool tooth top total touch tower town trade traffic train travel tree triangle
trip truck trust tunnel turn twelve under uncle unit upper usual valley value vegetable very village
violin visit voice wagon wait walk wall warm watch water wave weather week weight west wheat wheel white
whole wide wild window winter wire wise wolf wonder wood wool word work world worth write wrong yard
year yellow young zebra zero
"""

WORDS = tuple(_TEXT.split())
"""Lower-case words of 2 to 10 letters."""
